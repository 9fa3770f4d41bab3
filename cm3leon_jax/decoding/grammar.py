"""Restricts the next token of each row by a grammar: each row follows a plan of parts.

The grammar is a state machine with three integers of state per row.
"""

# B rows, M parts of a plan, V ids.

from collections.abc import Sequence
import dataclasses
import functools
import operator
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32
import numpy as np

from cm3leon_jax import templates
from cm3leon_jax.mesh import shard
from cm3leon_jax.templates import IN_TEXT, SEGMENT_START
from cm3leon_jax.vocab import VocabLayout

DONE, CODES, TEXT, EOSS, MASK, END, DOCUMENT = range(7)


class Part(NamedTuple):
  """One part of a plan.

  A part of each kind allows these tokens:
    CODES: exactly `count` image codes.
    TEXT: 1 to `count` text tokens, then `<eoss>`.
    EOSS: `<eoss>`.
    MASK: the sentinel `<mask:count>`.
    END: what may follow an image, by the template: `</s>` or `<break>`, or `<image_end>`.
    DOCUMENT: texts and images as the template joins them, and its end; at most `count` tokens.
    DONE: none.

  In a DOCUMENT, `place` says where the prompt ends: SEGMENT_START, IN_TEXT or AFTER_IMAGE.
  """

  kind: int
  count: int = 0  # type: ignore[assignment]  # The field hides `tuple.count`.
  place: int = 0


def max_new_tokens(plan: Sequence[Part]) -> int:
  """Returns the largest number of tokens that a plan allows."""
  most = 0
  for kind, count, _ in plan:
    most += {CODES: count, TEXT: count + 1, DOCUMENT: count, DONE: 0}.get(kind, 1)
  return most


def plan_array(plans: Sequence[Sequence[Part]], parts: int = 0) -> Int32[np.ndarray, "B M 3"]:
  """Converts the plans of B rows to an array. Each plan is padded with DONE, at least once.

  `parts` is M; 0 means the length of the longest plan + 1.
  """
  parts = parts or max(len(plan) for plan in plans) + 1
  return np.array([[*plan, *[Part(DONE)] * (parts - len(plan))] for plan in plans], np.int32)


class State(NamedTuple):
  """State of each row in its plan.

  Attributes:
    part: index of the current part.
    left: number of tokens that the current part may still get.
    place: in a DOCUMENT, the number of remaining codes of the current image, or SEGMENT_START,
      IN_TEXT or AFTER_IMAGE.
  """

  part: Int32[Array, " B"]
  left: Int32[Array, " B"]
  place: Int32[Array, " B"]


Plan: TypeAlias = Int32[Array, "B M 3"]  # The result of `plan_array`.


def _entry(plan: Plan, part: Int32[Array, " B"], column: int) -> Int32[Array, " B"]:
  return jax.vmap(lambda row, i: row[i, column])(plan, part)


@dataclasses.dataclass(frozen=True)
class Grammar:
  """Determines the legal next tokens from a plan, the vocabulary and the length of an image.

  plan CODES 2, END:            code code (</s> or <break>), with the template cm3leon
  plan TEXT 3, MASK 1, TEXT 9:  text <eoss> <mask:1> text <eoss>
  """

  vocab: VocabLayout
  image_tokens: int

  def start(self, plan: Plan) -> State:
    """Returns the state before the first token."""
    # Since jax 0.11, a slice of length 1 loses its sharding, so a batch of one sample needs this.
    left, place = (shard(plan[:, 0, column], "batch") for column in (1, 2))
    return State(jnp.zeros_like(left), left, place)

  def in_image(self, plan: Plan, state: State) -> Bool[Array, " B"]:
    """Returns a mask of the rows where only image codes are legal."""
    kind = _entry(plan, state.part, 0)
    return (kind == CODES) | ((kind == DOCUMENT) & (state.place > 0))

  def active(self, plan: Plan, state: State) -> Bool[Array, " B"]:
    """Returns a mask of the rows that are not done."""
    return _entry(plan, state.part, 0) != DONE

  def codes_done(self, plan: Plan, state: State) -> Int32[Array, " B"]:
    """Returns the number of codes generated so far in the current image or hole."""
    kind = _entry(plan, state.part, 0)
    return jnp.where(
      kind == CODES, _entry(plan, state.part, 1) - state.left, self.image_tokens - state.place
    )

  def legal(self, plan: Plan, state: State, ids: Int32[Array, " V"]) -> Bool[Array, "B V"]:
    """Returns a mask of the legal next ids. In a row that is done, no id is legal."""
    vocab, left, place = self.vocab, state.left, state.place
    template, kind = templates.of(vocab), _entry(plan, state.part, 0)
    document = kind == DOCUMENT
    may = {
      "text": (kind == TEXT) & (left > 0),
      "image": (kind == CODES) | (document & (place > 0)),
      "eoss": (kind == EOSS) | ((kind == TEXT) & (left < _entry(plan, state.part, 1))),
      **dict.fromkeys(template.after_drawn, kind == END),
    }
    for name, rule in template.rules.items():
      at = functools.reduce(operator.or_, (place == p for p in rule.places))
      fits = left >= rule.tokens + rule.images * self.image_tokens
      may[name] = may.get(name, False) | (document & at & fits)
    sentinel = jnp.where(kind == MASK, vocab.mask(0) + _entry(plan, state.part, 1), -1)
    among = {
      "text": (ids >= vocab.num_special) & (ids < vocab.text_size),
      "image": vocab.is_image(ids),
    }
    legal = sentinel[:, None] == ids[None]
    for name, rows in may.items():
      token = among[name] if name in among else ids == getattr(vocab, name)
      legal |= rows[:, None] & token[None]
    return legal

  def advance(self, plan: Plan, state: State, tokens: Int32[Array, " B"]) -> State:
    """Returns the state after one legal token per row. A row that is done does not change."""
    vocab, template = self.vocab, templates.of(self.vocab)
    kind, left = _entry(plan, state.part, 0), jnp.maximum(state.left - 1, 0)
    document, image = kind == DOCUMENT, vocab.is_image(tokens)
    place = jnp.where(
      image, jnp.where(state.place > 0, state.place, self.image_tokens) - 1, IN_TEXT
    )
    after_break = self.image_tokens if template.opens_image else SEGMENT_START
    place = jnp.where(tokens == vocab.brk, after_break, place)
    finished = (kind == EOSS) | (kind == MASK) | (kind == END)
    finished |= (
      ((kind == CODES) & (left == 0))
      | ((kind == TEXT) & (tokens == vocab.eoss))
      | (document & (tokens == getattr(vocab, template.end)))
    )
    part = state.part + finished
    left = jnp.where(finished, _entry(plan, part, 1), left)
    place = jnp.where(document, place, state.place)
    return State(part, left, jnp.where(finished, _entry(plan, part, 2), place))

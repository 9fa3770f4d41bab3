"""The tokens that may come next: each row follows a plan of parts.

The decoding loop carries the state of a small state machine, three integers a row.
"""

# B rows, M parts of a plan, V ids.

from collections.abc import Sequence
import dataclasses
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32
import numpy as np

from cm3leon_jax.mesh import shard
from cm3leon_jax.vocab import VocabLayout

DONE, CODES, TEXT, EOSS, MASK, END, DOCUMENT = range(7)
# Place of a document's next token outside of images: segment start, in a text, after an image.
SEGMENT_START, IN_TEXT, AFTER_IMAGE = -1, -2, 0


class Part(NamedTuple):
  """One part of what is generated.

  Attributes:
    kind: CODES exactly `count` image codes; TEXT 1 to `count` text tokens, then `<eoss>`; EOSS
      `<eoss>`; MASK the sentinel `<mask:count>`; END `</s>` or `<break>`; DOCUMENT texts and images
      with `<break>` between them, at most `count` tokens, the last of them `</s>`; DONE nothing.
    count: see `kind`.
    place: of a DOCUMENT: SEGMENT_START, IN_TEXT or AFTER_IMAGE, where the prompt ends.
  """

  kind: int
  count: int = 0  # type: ignore[assignment]  # The method of this name of tuples is not used.
  place: int = 0

  @property
  def max_new_tokens(self) -> int:
    """Largest number of tokens of the part."""
    return {CODES: self.count, TEXT: self.count + 1, DOCUMENT: self.count, DONE: 0}.get(
      self.kind, 1
    )


def max_new_tokens(plan: Sequence[Part]) -> int:
  """Returns the largest number of tokens of a plan."""
  return sum(part.max_new_tokens for part in plan)


def plan_array(plans: Sequence[Sequence[Part]], parts: int = 0) -> Int32[np.ndarray, "B M 3"]:
  """Returns the plans of B rows, padded with DONE; every row ends in at least one.

  Args:
    plans: of each row.
    parts: M; default: that of the longest plan and one DONE.
  """
  parts = parts or max(len(plan) for plan in plans) + 1
  return np.array([[*plan, *[Part(DONE)] * (parts - len(plan))] for plan in plans], np.int32)


class State(NamedTuple):
  """State of each row's plan.

  Attributes:
    part: index of the part in the row's plan.
    left: tokens that the part may still take.
    place: of a DOCUMENT: remaining codes of the current image, or SEGMENT_START, IN_TEXT,
      AFTER_IMAGE.
  """

  part: Int32[Array, " B"]
  left: Int32[Array, " B"]
  place: Int32[Array, " B"]


Plan: TypeAlias = Int32[Array, "B M 3"]  # Of `plan_array`.


def _entry(plan: Plan, part: Int32[Array, " B"], column: int) -> Int32[Array, " B"]:
  return jax.vmap(lambda row, i: row[i, column])(plan, part)


@dataclasses.dataclass(frozen=True)
class Grammar:
  """The tokens that may follow; depends only on the vocabulary and the length of an image.

  plan CODES 2, END:            code code (</s> or <break>)
  plan TEXT 3, MASK 1, TEXT 9:  text <eoss> <mask:1> text <eoss>
  """

  vocab: VocabLayout
  image_tokens: int

  def __post_init__(self) -> None:
    if self.image_tokens < 1:
      raise ValueError(f"image_tokens is {self.image_tokens}; an image has at least one code.")

  def start(self, plan: Plan) -> State:
    """Returns the state before the first token."""
    # From jax 0.11 on, a slice of one entry has no sharding: that of a batch of one sample.
    left, place = (shard(plan[:, 0, column], "batch") for column in (1, 2))
    return State(jnp.zeros_like(left), left, place)

  def in_image(self, plan: Plan, state: State) -> Bool[Array, " B"]:
    """Returns in which rows only image codes may come next."""
    kind = _entry(plan, state.part, 0)
    return (kind == CODES) | ((kind == DOCUMENT) & (state.place > 0))

  def active(self, plan: Plan, state: State) -> Bool[Array, " B"]:
    """Returns in which rows a token may come next."""
    return _entry(plan, state.part, 0) != DONE

  def codes_done(self, plan: Plan, state: State) -> Int32[Array, " B"]:
    """Returns the number of codes so far of the current image, or of the current hole in one."""
    kind = _entry(plan, state.part, 0)
    return jnp.where(
      kind == CODES, _entry(plan, state.part, 1) - state.left, self.image_tokens - state.place
    )

  def legal(self, plan: Plan, state: State, ids: Int32[Array, " V"]) -> Bool[Array, "B V"]:
    """Returns which ids may come next; none in a row that is done."""
    vocab, left, place = self.vocab, state.left, state.place
    kind = _entry(plan, state.part, 0)
    document = kind == DOCUMENT
    begins, in_text, after_image = (
      document & (place == p) for p in (SEGMENT_START, IN_TEXT, AFTER_IMAGE)
    )
    # Tokens must remain: for `</s>` after a text token, for a text token and `</s>` after <break>.
    may = {
      "text": ((kind == TEXT) & (left > 0)) | ((begins | in_text) & (left >= 2)),
      "image": (kind == CODES) | (document & (place > 0)) | (begins & (left > self.image_tokens)),
      "eoss": (kind == EOSS) | ((kind == TEXT) & (left < _entry(plan, state.part, 1))),
      "eos": (kind == END) | in_text | after_image,
      "brk": (kind == END) | ((in_text | after_image) & (left >= 3)),
    }
    sentinel = jnp.where(kind == MASK, vocab.mask(0) + _entry(plan, state.part, 1), -1)
    among = {
      "text": (ids >= vocab.num_special) & (ids < vocab.text_size),
      "image": vocab.is_image(ids),
      "eoss": ids == vocab.eoss,
      "eos": ids == vocab.eos,
      "brk": ids == vocab.brk,
    }
    legal = sentinel[:, None] == ids[None]
    for name, rows in may.items():
      legal |= rows[:, None] & among[name][None]
    return legal

  def next_part(self, plan: Plan, state: State) -> State:
    """Returns the state after the end of each row's current part."""
    part = state.part + 1
    return State(part, _entry(plan, part, 1), _entry(plan, part, 2))

  def advance(self, plan: Plan, state: State, tokens: Int32[Array, " B"]) -> State:
    """Returns the state after one more legal token a row; a row that is done stays done."""
    vocab = self.vocab
    kind, left = _entry(plan, state.part, 0), jnp.maximum(state.left - 1, 0)
    document, image = kind == DOCUMENT, vocab.is_image(tokens)
    place = jnp.where(
      image, jnp.where(state.place > 0, state.place, self.image_tokens) - 1, IN_TEXT
    )
    place = jnp.where(tokens == vocab.brk, SEGMENT_START, place)
    finished = (kind == EOSS) | (kind == MASK) | (kind == END)
    finished |= (
      ((kind == CODES) & (left == 0))
      | ((kind == TEXT) & (tokens == vocab.eoss))
      | (document & (tokens == vocab.eos))
    )
    part = state.part + finished
    left = jnp.where(finished, _entry(plan, part, 1), left)
    place = jnp.where(document, place, state.place)
    return State(part, left, jnp.where(finished, _entry(plan, part, 2), place))

"""Tests that the grammar allows exactly the legal tokens, defined by regular expressions."""

# B rows, V vocabulary, T steps.

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm3leon_jax.decoding.grammar import (
  CODES,
  DOCUMENT,
  DONE,
  END,
  EOSS,
  MASK,
  TEXT,
  Grammar,
  Part,
  State,
  plan_array,
)
from cm3leon_jax.mesh import shard
from cm3leon_jax.templates import AFTER_IMAGE, IN_TEXT, SEGMENT_START
from cm3leon_jax.vocab import VocabLayout
from tests.models.tiny import mesh_of

VOCAB = VocabLayout(num_special=9, text_size=268, image_size=16)
CHAMELEON = VocabLayout(9, 268, 16, "chameleon")
# Letter -> ids: p <pad>, e </s>, u <unk>, b <break>, s <eoss>, A to D <mask:0> to <mask:3>,
# t text, i image. With the template chameleon, D is <image_end>.
CLASSES = {letter: [i] for i, letter in enumerate("peubsABCD")} | {
  "t": range(9, 268),
  "i": range(268, 284),
}
LETTERS = np.array([letter for letter, ids in CLASSES.items() for _ in ids])
FIRST = {letter: ids[0] for letter, ids in CLASSES.items()}
PARTS, ROWS = 8, 4096  # Number of parts and of rows to which arrays are padded.


def documents(image: int, vocab=VOCAB):
  """Returns where a document's prompt ends -> regular expression of its continuations."""
  if vocab == CHAMELEON:
    some = rf"(t|bi{{{image}}}D)"
    return {SEGMENT_START: f"{some}+s", IN_TEXT: f"{some}*s", AFTER_IMAGE: f"D{some}*s"}
  segment = rf"(t+|i{{{image}}})"
  return {
    SEGMENT_START: rf"{segment}(b{segment})*e",
    IN_TEXT: rf"t*(b{segment})*e",
    AFTER_IMAGE: rf"(b{segment})*e",
  }


def languages(image: int, lengths, vocab):
  """Returns [(plan, regular expression of its token strings, maximum number of tokens)]."""
  end = "D" if vocab == CHAMELEON else "[eb]"
  plans = [
    ((Part(CODES, image), Part(END)), rf"i{{{image}}}{end}", image + 1),
    ((Part(CODES, 1), Part(EOSS)), "is", 2),
    ((Part(TEXT, 4),), "t{1,4}s", 5),
    ((Part(TEXT, 1), Part(MASK, 2), Part(TEXT, 2)), "tsCt{1,2}s", 6),
    ((Part(TEXT, 2), Part(MASK, 1), Part(CODES, 1), Part(EOSS)), "t{1,2}sBis", 6),
    ((Part(CODES, 2), Part(EOSS), Part(MASK, 3), Part(TEXT, 1)), "i{2}sDts", 6),
    ((Part(END),), end, 1),
    ((Part(DONE),), "", 0),
  ]
  return plans + [
    ((Part(DOCUMENT, length, place),), pattern, length)
    for place, pattern in documents(image, vocab).items()
    for length in lengths
  ]


def is_legal(text: str, pattern: str, most: int) -> bool:
  return len(text) <= most and re.fullmatch(pattern, text) is not None


@pytest.fixture(autouse=True, scope="module")
def mesh():
  with jax.set_mesh(mesh_of(1, 1, 1)):
    yield


def rows_of(plans):
  """Returns the array of plans padded to PARTS parts, so that all calls share compiled programs."""
  return plan_array([(*plan, *[Part(DONE)] * (PARTS - len(plan))) for plan in plans])


def by_batch(function):
  """Jits `function(grammar, plan, *rest)` and shards its arrays over the batch."""

  def place(tree):
    return jax.tree.map(lambda x: shard(x, *["batch"] + [None] * (x.ndim - 1)), tree)

  return jax.jit(lambda grammar, *rest: function(grammar, *place(rest)), static_argnums=0)


@by_batch
def ask(grammar, plan, state):
  return grammar.legal(plan, state, jnp.arange(VOCAB.size)), grammar.active(plan, state)


start, step = by_batch(Grammar.start), by_batch(Grammar.advance)
image_so_far = by_batch(lambda grammar, *rest: (grammar.in_image(*rest), grammar.codes_done(*rest)))


def test_docstring_examples():
  grammar, plan = (
    Grammar(VOCAB, 2),
    rows_of([(Part(CODES, 2), Part(END)), (Part(TEXT, 3), Part(MASK, 1), Part(TEXT, 9))]),
  )
  state, found = start(grammar, plan), []
  for taken in ("it", "is", "eB", "pt"):
    legal = np.asarray(ask(grammar, plan, state)[0])
    found.append([" ".join(dict.fromkeys(LETTERS[row])) for row in legal])
    state = step(grammar, plan, state, np.array([FIRST[x] for x in taken], np.int32))
  assert found == [["i", "t"], ["i", "s t"], ["e b", "B"], ["", "t"]]


def filled(x):
  """Pads an array to ROWS rows, so that all calls share a compiled program."""
  return np.pad(np.asarray(x), [(0, ROWS - len(x))] + [(0, 0)] * (np.ndim(x) - 1), mode="edge")


@pytest.mark.parametrize(("vocab", "image"), [(VOCAB, 1), (VOCAB, 2), (VOCAB, 3), (CHAMELEON, 2)])
def test_admits_exactly_the_language(vocab, image):
  """Extends strings by every legal token; the complete strings are exactly the language."""
  grammar, depth = Grammar(vocab, image), 6
  plans = languages(image, range(2, depth + 1), vocab)
  complete = [set() for _ in plans]
  # Unfinished strings of all plans: [(index of the plan, letters so far)]. One call extends them
  # all.
  alive, plan = [(n, "") for n in range(len(plans))], rows_of([plan for plan, _, _ in plans])
  state = start(grammar, plan)
  for _ in range(depth + 1):
    state = State(*map(filled, state))
    legal, active = (np.asarray(x)[: len(alive)] for x in ask(grammar, filled(plan), state))
    for ids in CLASSES.values():  # Of each class, all ids are legal or none.
      assert (legal[:, list(ids)] == legal[:, [ids[0]]]).all()
    assert legal[active].any(axis=1).all()  # Every unfinished string can be continued.
    for i in np.flatnonzero(~active):
      assert not legal[i].any()
      complete[alive[i][0]].add(alive[i][1])
    index, taken = np.nonzero(legal[:, list(FIRST.values())])
    tokens = np.array(list(FIRST.values()), np.int32)[taken]
    alive = [(alive[i][0], alive[i][1] + list(FIRST)[letter]) for i, letter in zip(index, taken)]
    if not alive:
      break
    plan = plan[index]
    state = step(grammar, filled(plan), State(*(filled(x[index]) for x in state)), filled(tokens))
    state = State(*(np.asarray(x)[: len(alive)] for x in state))
  assert not alive
  for (_, pattern, most), found in zip(plans, complete):
    used = [letter for letter in FIRST if letter in pattern or letter in "pu"]
    strings = ("".join(s) for n in range(most + 1) for s in itertools.product(used, repeat=n))
    assert found == {s for s in strings if is_legal(s, pattern, most)}


def test_what_may_follow_an_image():
  """Counts the codes so far of a part and of an image in a document; None if text may follow."""
  grammar = Grammar(VOCAB, 3)
  plan = rows_of([(Part(CODES, 2), Part(EOSS)), (Part(DOCUMENT, 9, SEGMENT_START),)])
  state, found = start(grammar, plan), []
  for taken in ("ii", "ii", "si", "pe"):
    inside, done = (np.asarray(x) for x in image_so_far(grammar, plan, state))
    found.append([int(n) if yes else None for yes, n in zip(inside, done)])
    state = step(grammar, plan, state, np.array([FIRST[x] for x in taken], np.int32))
  assert found == [[0, None], [1, 1], [None, 2], [None, None]]

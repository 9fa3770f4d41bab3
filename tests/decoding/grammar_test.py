"""The grammar admits every legal token and no other."""

import jax.numpy as jnp
import numpy as np
import pytest

from cm3leon_jax.decoding.grammar import TextToImage
from cm3leon_jax.vocab import VocabLayout

VOCAB = VocabLayout(num_special=8, text_size=264, image_size=16)


def test_image_then_end():
  grammar, ids = TextToImage(VOCAB, 3), jnp.arange(VOCAB.size)
  state, spans = grammar.start(2), []
  for _ in range(5):
    legal = np.asarray(grammar.legal(state, ids))
    np.testing.assert_array_equal(legal[0], legal[1])
    spans.append(np.flatnonzero(legal[0]).tolist())
    state = grammar.advance(state)
  codes = list(range(264, 280))
  assert spans == [codes, codes, codes, [VOCAB.eos, VOCAB.brk], []]


def test_rows_cover_what_is_legal():
  grammar, ids = TextToImage(VOCAB, 2), jnp.arange(VOCAB.size)
  for state, rows in ((2, grammar.image_rows), (1, grammar.image_rows), (0, grammar.end_rows)):
    legal = np.flatnonzero(grammar.legal(jnp.array([state]), ids)[0])
    assert set(legal) == set(rows.tolist())


def test_prompts_may_be_in_different_states():
  legal = TextToImage(VOCAB, 2).legal(jnp.array([1, 0, -1]), jnp.array([VOCAB.eos, VOCAB.brk, 7, 264]))
  np.testing.assert_array_equal(legal, [[0, 0, 0, 1], [1, 1, 0, 0], [0, 0, 0, 0]])


def test_refuses_an_empty_image():
  with pytest.raises(ValueError, match="image_tokens"):
    TextToImage(VOCAB, 0)

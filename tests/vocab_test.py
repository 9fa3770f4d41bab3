from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from cm3leon_jax.vocab import VocabLayout
from tests.refusals import refused

SMALL = VocabLayout(num_special=8, text_size=300, image_size=16)


def test_paper_layout():
  vocab = VocabLayout()
  assert vocab.size == 64_512 == 2**10 * 63
  assert vocab.special_tokens()[:6] == ["<pad>", "</s>", "<unk>", "<break>", "<eoss>", "<mask:0>"]
  first = [vocab.pad, vocab.eos, vocab.unk, vocab.brk, vocab.eoss, vocab.mask(0)]
  assert first == [0, 1, 2, 3, 4, 5]


def test_every_id_has_one_kind():
  ids = np.arange(-1, SMALL.size + 1)
  assert ids[SMALL.is_image(ids)].tolist() == list(range(300, 316))
  assert ids[SMALL.is_mask(ids)].tolist() == [5, 6, 7]


@given(st.lists(st.integers(0, SMALL.image_size - 1)))
def test_image_codes_invert_image_ids(codes):
  ids = SMALL.image_ids(codes)
  assert ids.dtype == np.int32
  assert SMALL.is_image(ids).all()
  assert SMALL.image_codes(ids).tolist() == codes


@pytest.mark.parametrize(
  ("method", "value", "fact"),
  [
    ("image_ids", [3, -1], "-1"),
    ("image_ids", [3, 16], "16"),
    ("image_codes", [300, 299], "299"),
    ("image_codes", [300, 316], "316"),
    ("mask", -1, "<mask:-1>"),
    ("mask", 3, "<mask:3>"),
  ],
)
def test_codes_ids_and_sentinels_outside_of_the_vocabulary_are_refused(method, value, fact):
  with refused(ValueError, fact):
    getattr(SMALL, method)(value)

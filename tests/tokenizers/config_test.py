"""Levels of FSQ that make a number of codes."""

import pytest

from cm3leon_jax.tokenizers.config import check_levels, levels_of


def test_levels_in_literals():
  assert levels_of(1_024) == (8, 8, 4, 4)
  assert levels_of(512) == (8, 8, 8)
  assert levels_of(8_192) == (8, 8, 8, 4, 4)
  assert levels_of(1_000) == (8, 5, 5, 5)
  assert levels_of(1_021) == ()


def test_fsq_refuses_other_numbers_of_codes_and_names_the_nearest():
  nearest = r"1021; it must be a product of levels .* 1024 = 8 x 8 x 4 x 4 or 1029 = 7 x 7 x 7 x 3"
  with pytest.raises(ValueError, match=nearest):
    check_levels(1_021, 4)
  with pytest.raises(ValueError, match=r"code_dim is 8; for .* must be 4: 1024 codes are 8 x 8"):
    check_levels(1_024, 8)

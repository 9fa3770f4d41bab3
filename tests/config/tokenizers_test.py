from cm3leon_jax.config.tokenizers import check_levels, levels_of
from tests.refusals import refused


def test_levels_in_literals():
  found = [levels_of(n) for n in (512, 1_024, 8_192, 1_000, 1_021)]
  assert found == [(8, 8, 8), (8, 8, 4, 4), (8, 8, 8, 4, 4), (8, 5, 5, 5), ()]


def test_fsq_refuses_other_numbers_of_codes_and_names_the_nearest():
  with refused(ValueError, "vocab.image_size is 1021"):
    check_levels(1_021, 4)
  with refused(ValueError, "vqgan.code_dim is 8"):
    check_levels(1_024, 8)

import dataclasses

import pytest

from cm3leon_jax.decoding.config import METHODS as NAMES
from cm3leon_jax.decoding.config import SamplingConfig
from cm3leon_jax.decoding.sampling.contrastive import CONTRASTIVE
from cm3leon_jax.decoding.sampling.method import TokenMethod
from cm3leon_jax.decoding.sampling.methods import (
  METHODS,
  OTHERS,
  choose_method,
  settings_of_codes,
)
from cm3leon_jax.decoding.sampling.top_p import TEXT_SETTINGS, TOP_P

FIELDS = {field.name for field in dataclasses.fields(SamplingConfig)}
GUIDANCE = {"guidance", "guidance_schedule", "image_guidance", "edit_guidance"}


def test_every_method_of_the_config_is_an_object_and_no_other():
  assert tuple(METHODS) == NAMES
  assert all(SamplingConfig(name).method == name for name in METHODS)


def test_every_field_of_the_config_is_read():
  assert {*settings_of_codes(unconditional=True), *TEXT_SETTINGS, *GUIDANCE} == FIELDS


@pytest.mark.parametrize("name", METHODS)
def test_what_a_method_says_of_itself(name):
  method = METHODS[name]
  assert set(method.settings) <= FIELDS
  assert set(method.members) <= {TOP_P, *OTHERS}
  assert {*method.settings} == {field for member in method.members for field in member.settings}
  assert method.needs_unconditional == any(m.needs_unconditional for m in method.members)
  assert {method.choose(seed) for seed in range(10)} == {*method.members}
  if isinstance(method, TokenMethod):
    assert method.temperature in method.numbers
    assert set(method.numbers) <= set(method.settings)
    assert isinstance(hash(method.compiled(SamplingConfig())), int)


def test_the_method_of_a_sample():
  """Samples of one stream use top-p, because contrastive decoding needs a second stream."""
  assert [choose_method("mixture", seed, 2) for seed in (4, 5)] == [TOP_P, CONTRASTIVE]
  assert [choose_method("mixture", seed, 1) for seed in (4, 5)] == [TOP_P, TOP_P]
  assert [choose_method("contrastive", 4, streams) for streams in (3, 1)] == [CONTRASTIVE, TOP_P]
  assert choose_method("top_p", 5, 3) == TOP_P

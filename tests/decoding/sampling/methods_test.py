import dataclasses

from cm3leon_jax.config.sampling import SamplingConfig
from cm3leon_jax.decoding.sampling.methods import (
  SETTINGS,
  TEXT_SETTINGS,
  is_contrastive,
  is_guided,
  settings_of_codes,
  unread_settings,
)

GUIDANCE = {"guidance", "guidance_schedule", "image_guidance", "edit_guidance"}
CDK = ("contrastive_k", "contrastive_alpha", "contrastive_temperature", "amateur_temperature")
TOP = ("temperature", "top_k", "top_p")


def test_every_field_of_the_config_is_read():
  fields = {field.name for field in dataclasses.fields(SamplingConfig)}
  assert {*settings_of_codes(unconditional=True), *TEXT_SETTINGS, *GUIDANCE} == fields


def test_settings_literals():
  assert settings_of_codes(unconditional=True) == (*TOP, "method", *CDK)
  assert settings_of_codes(unconditional=False) == TOP
  assert [unread_settings(name) for name in SETTINGS] == [CDK, TOP, ()]
  assert [is_guided(name) for name in SETTINGS] == [True, False, True]


def test_the_method_of_a_sample():
  """Samples of one stream use top-p, because contrastive decoding needs a second stream."""
  chosen = [is_contrastive("mixture", seed, 2) for seed in range(10)]
  assert chosen == [False, True, True, True, False, True, False, False, True, False]
  assert [is_contrastive("contrastive", 4, streams) for streams in (3, 2, 1)] == [True, True, False]
  assert not is_contrastive("mixture", 5, 1)
  assert not is_contrastive("top_p", 5, 3)

"""Tests rules that involve several fields, and that unknown fields are rejected."""

import pytest

from cm3leon_jax.config.settings import settings_from_stored
from cm3leon_jax.errors import UserError
from tests.config.settings_test import settings_with
from tests.refusals import refused


@pytest.mark.parametrize(
  "fields",
  [
    {"seed": -1},
    {"seed": True},
    {"vocab__text_size": 511},
    {"vqgan__local_codes": True},
    {"vqgan__downsample": 6},
    {"vqgan__resolution": 252},
    {"vqgan__decoder_blocks": (1, 1)},
    {"vqgan__discriminator_layers": 9},
    {"vqgan__perceptual_weight": 0.5},
    {"vqgan__quantizer": "fsq", "vqgan__code_dim": 4},
    {"vqgan__quantizer": "fsq", "vocab__image_size": 8_191, "model__vocab_size": 64_511},
    {"clip__patch": 48},
    {"retrieval__max_candidates": 1},
    {"data__interleaved_share": 0.5},
    {"data__neighbor_sampling": "paper"},
    {"model__num_heads": 7},
    {"model__family": "modern", "model__width": 6, "model__num_heads": 2},
    {"model__family": "modern", "model__head_size": 65},
    {"model__family": "modern", "model__num_kv_heads": 3},
    {"model__family": "modern", "model__swin_norm": True},
    {"model__num_kv_heads": 2},
    {"model__rope_base": 1e6},
    {"model__family": "modern", "model__activation": "gelu"},
    {"model__align_images": True},
    {"mesh__data": -1},
    {"mesh__tensor": 0},
    {"train__gradient_accumulation_steps": 3},
    {"train__gradient_accumulation_steps": 2, "train__rows_per_device": 4},
    {"train__checkpoint_every": 4, "train__keep_every": 6},
    {"train__eval_every": 3, "train__checkpoint_every": 4, "train__keep_best": 1},
    {"train__only": ("head",)},  # `opt` has no output table of its own.
    {"train__only": ("embed", "layers")},
    {"train__only": ("embed.text",)},
    {"train__only": ("embed", "embed.image")},
    {"train__only": ("layers.3-2",)},
    {"train__only": ("layers.0-32",)},
    {"train__only": ("layers",), "adapter__rank": 4},
    {"model__vocab_size": 1_000},
    {"data__sequence_length": 8_192},
    {
      "model__family": "modern",
      "model__align_images": True,
      "data__text_share": 0.0,
      "data__interleaved_share": 0.1,
    },
    {"mesh__tensor": 3},
    {"model__family": "modern", "mesh__tensor": 8, "model__num_kv_heads": 4},
    {"mesh__tensor": 8, "model__mlp_width": 100},
    {"model__num_layer": 2},
    {"moddel": {}},
  ],
)
def test_contradictions_and_unknown_fields_are_refused(fields):
  with pytest.raises(UserError) as error:
    settings_with(**fields)
  assert any(name.rpartition("__")[2] in str(error.value) for name in fields)


def test_stored_settings_of_another_version_are_refused_in_one_sentence():
  with refused(UserError, "vqgan.num_colors", "another version"):
    settings_from_stored({"vqgan": {"num_colors": 8}})

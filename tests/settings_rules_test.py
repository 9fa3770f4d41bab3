"""Rules about several fields, and unknown fields."""

import pytest

from cm3leon_jax.config import UserError
from cm3leon_jax.settings import SECTIONS
from tests.settings_test import settings_with


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"seed": -1}, "config.seed is -1; it must be at least 0."),
    ({"seed": True}, "config.seed is True; it must be a valid integer."),
    (
      {"vocab__text_size": 511},
      "config.vocab: text_size is 511; it must be at least 512: "
      "num_special = 256 and the 256 bytes of byte-level BPE.",
    ),
    (
      {"vqgan__local_codes": True},
      "config.vqgan: local_codes is set, and stem is 2; it must be downsample = 8.",
    ),
    (
      {"vqgan__downsample": 6},
      "config.vqgan: downsample is 6; it must be stem = 2 times a power of two.",
    ),
    (
      {"vqgan__resolution": 252},
      "config.vqgan: resolution is 252; it must be a multiple of downsample = 8.",
    ),
    (
      {"vqgan__decoder_blocks": (1, 1)},
      "config.vqgan: decoder_blocks is (1, 1); it must hold 3 integers, one per halving from "
      "stem = 2 to downsample = 8.",
    ),
    (
      {"vqgan__discriminator_layers": 9},
      "config.vqgan: discriminator_layers is 9; 2^layers must be at most resolution = 256.",
    ),
    (
      {"vqgan__perceptual_weight": 0.5},
      "config.vqgan: perceptual is '' and perceptual_weight 0.5; both must be given, a file and a "
      "positive weight, or neither.",
    ),
    (
      {"vqgan__quantizer": "fsq", "vqgan__code_dim": 4},
      "config: vqgan.code_dim is 4; for vqgan.quantizer = fsq it must be 5: 8192 codes are "
      "8 x 8 x 8 x 4 x 4 levels.",
    ),
    (
      {"vqgan__quantizer": "fsq", "vocab__image_size": 8_191, "model__vocab_size": 64_511},
      "config: vqgan.quantizer is fsq, and vocab.image_size is 8191; it must be a product of "
      "levels from 3 to 8, e.g. 8192 = 8 x 8 x 8 x 4 x 4 or 8232 = 7 x 7 x 7 x 6 x 4.",
    ),
    ({"clip__patch": 48}, "config.clip: patch = 48 does not divide resolution = 256."),
    (
      {"retrieval__max_candidates": 1},
      "config.retrieval: max_candidates is 1; it must be at least kept_per_side = 2.",
    ),
    (
      {"data__interleaved_share": 0.5},
      "config.data: text_share is 0.7 and interleaved_share 0.5; their sum must be at most 1.",
    ),
    (
      {"data__neighbor_sampling": "paper"},
      "config.data: neighbor_sampling is 'paper', which picks 3 of 4 candidates, "
      "and num_neighbors is 2; set num_neighbors=3.",
    ),
    ({"model__num_heads": 7}, "config.model: num_heads = 7 does not divide width = 4096."),
    (
      {"model__family": "modern", "model__width": 6, "model__num_heads": 2},
      "config.model: width / num_heads = 3 is odd; rotary positions need an even head size.",
    ),
    (
      {"model__family": "modern", "model__head_size": 65},
      "config.model: head_size = 65 is odd; rotary positions need an even head size.",
    ),
    (
      {"model__rope_base": 1e6},
      "config.model: rope_base is 1000000.0, and family is 'opt'; only 'modern' has rotary "
      "positions.",
    ),
    (
      {"model__family": "modern", "model__activation": "gelu"},
      "config.model: activation is 'gelu', and family is 'modern', whose feed-forward layer is "
      "SwiGLU: leave it empty.",
    ),
    (
      {"model__align_images": True},
      "config.model: align_images is set, and family is 'opt'; it must be 'modern', whose "
      "positions are relative.",
    ),
    (
      {"mesh__data": -1},
      "config.mesh: mesh (data, fsdp, fsdp_inner, tensor) = (-1, -1, 1, 1); each must be positive, "
      "or one of them -1 (the remaining devices).",
    ),
    (
      {"mesh__tensor": 0},
      "config.mesh: mesh (data, fsdp, fsdp_inner, tensor) = (1, -1, 1, 0); each must be positive, "
      "or one of them -1 (the remaining devices).",
    ),
    (
      {"train__gradient_accumulation_steps": 3},
      "config.train: gradient_accumulation_steps = 3 does not divide global_batch_size = 8192.",
    ),
    (
      {"train__gradient_accumulation_steps": 2, "train__rows_per_device": 4},
      "config.train: rows_per_device = 4 sets gradient_accumulation_steps, which is 2: leave it at "
      "1, or set rows_per_device = 0.",
    ),
    (
      {"train__replay_tolerance": 0.01},
      "config.train: replay_tolerance is 0.01, and replay_every = 0 computes no step twice: set "
      "replay_every, or replay_tolerance = 0.",
    ),
    (
      {"model__vocab_size": 1_000},
      "config: model.vocab_size is 1000; it must be vocab.size = 64512: leave it out.",
    ),
    (
      {"data__sequence_length": 8_192},
      "config: model.max_positions is 4096; it must be at least data.sequence_length = 8192.",
    ),
    (
      {
        "model__family": "modern",
        "model__align_images": True,
        "data__text_share": 0.0,
        "data__interleaved_share": 0.1,
      },
      "config: model.align_images is set, and data.interleaved_share is 0.1; one of them must be "
      "0: positions cannot be counted from an image that comes later.",
    ),
    (
      {"mesh__tensor": 3},
      "config: mesh.tensor is 3; it must divide model.num_heads = 32.",
    ),
    (
      {"mesh__tensor": 8, "model__mlp_width": 100},
      "config: mesh.tensor is 8; it must divide model.mlp_width = 100.",
    ),
    ({"model__num_layer": 2}, "config.model has no field 'num_layer': did you mean 'num_layers'?"),
    (
      {"moddel": {}},
      f"config has no section 'moddel': it has seed, {', '.join(SECTIONS)}.",
    ),
  ],
)
def test_contradictions_and_unknown_fields_are_refused(fields, message):
  with pytest.raises(UserError) as error:
    settings_with(**fields)
  assert str(error.value) == message

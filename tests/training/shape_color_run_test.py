"""Trains a decoder whose image codes are pairs, and checks its token tables."""

import dataclasses

import jax
import numpy as np
import pytest

from cm3leon_jax.config.training import OptimizerConfig
from cm3leon_jax.mesh import shard
from tests.data.stores import VOCAB
from tests.models.tiny import mesh_of
from tests.training.runs import MODEL, shared_steps

COLORS = 4


@pytest.mark.parametrize("colors", [COLORS, 0])
def test_rows_of_unused_codes_learn_the_color_of_used_codes(colors):
  """All targets have the last color. Codes that never occur move as their shape and color do."""
  model = dataclasses.replace(MODEL, code_colors=colors)
  first = VOCAB.text_size
  shapes = np.random.default_rng(0).integers(1, VOCAB.image_size // COLORS, (2, 8, 65))
  ids = (first + shapes * COLORS + COLORS - 1).astype(np.int32)
  with jax.set_mesh(mesh_of(1, 2, 1)):
    steps = shared_steps(
      model, OptimizerConfig(learning_rate=1e-2, warmup_steps=1), 1, VOCAB, 0, (1, 2, 1)
    )
    state = steps.init()
    before = jax.device_get(state.params["embed"])
    for tokens in ids:
      ones = np.ones((8, 64), np.int32)
      batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": ones}
      batch |= {"loss_weights": ones.astype(np.float32), "positions": np.cumsum(ones, 1, np.int32)}
      state, _ = steps.train(state, {k: shard(x, "batch", "length") for k, x in batch.items()})
    moved = jax.device_get(state.params["embed"]) - before
  codes = moved[first:].reshape(-1, COLORS, MODEL.width)
  differences = codes[:, -1] - codes[:, 0]
  used, unused = differences[1:].mean(0), differences[0]
  alike = unused @ used / (used @ used)
  assert alike > 0.3 if colors else alike < 0.1

"""Trains a decoder whose image codes are pairs, and checks its token tables."""

import dataclasses

import jax
import numpy as np
import pytest

from cm3leon_jax.mesh import shard
from cm3leon_jax.training.config import OptimizerConfig
from tests.data.stores import VOCAB
from tests.models.tiny import mesh_of
from tests.training.runs import MODEL, shared_steps

COLORS = 4


@pytest.mark.parametrize("colors", [COLORS, 0])
def test_rows_of_codes_remain_sums_of_a_shape_and_a_color(colors):
  model = dataclasses.replace(MODEL, code_colors=colors)
  ids = np.random.default_rng(0).integers(0, VOCAB.size, (2, 8, 65)).astype(np.int32)
  with jax.set_mesh(mesh_of(1, 4, 2)):
    steps = shared_steps(
      model, OptimizerConfig(learning_rate=1e-2, warmup_steps=1), 1, VOCAB, 0, (1, 4, 2)
    )
    state = steps.init()
    for tokens in ids:
      ones = np.ones((8, 64), np.int32)
      batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": ones}
      batch |= {"loss_weights": ones.astype(np.float32), "positions": np.cumsum(ones, 1, np.int32)}
      state, _ = steps.train(state, {k: shard(x, "batch", "length") for k, x in batch.items()})
    table = jax.device_get(state.params["embed"])
  codes = table[VOCAB.text_size :].reshape(-1, COLORS, MODEL.width)
  sums = codes.mean(1, keepdims=True) + codes.mean(0) - codes.mean((0, 1))
  assert (np.abs(codes - sums).max() < 1e-5) == bool(colors)

"""Saves checkpoints of a tiny decoder, and damages their files."""

import jax

from cm3leon_jax.config.training import OptimizerConfig
from cm3leon_jax.training.step.optimizer import create_optimizer
from cm3leon_jax.training.step.state import init_state
from tests.models.tiny import CONFIG

OPTIMIZER = create_optimizer(OptimizerConfig(), 10)
INIT = jax.jit(lambda key: init_state(CONFIG, OPTIMIZER, key))


def fresh(seed):
  return INIT(jax.random.key(seed))


def largest_file(folder):
  return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


def on_disk(folder):
  return [
    sorted(int(path.stem) for path in (folder / name).iterdir())
    for name in ("checkpoints", "checkpoints.digests")
  ]

r"""Measures how much saves and checked steps slow down training, at the size of `scenes`.

  python -m benchmarks.save_cost
  python -m benchmarks.save_cost --replay_every=200

Runs blocks of `--block` steps on random tokens; every second block begins with a save. The cost of
a save is the time for which it stops the loop, plus the extra time of the steps that run until the
checkpoint has its digests. The cost is printed as a share of the time between two checkpoints of
the config.

With `--replay_every`, the last step of each block is repeated and compared (`train.replay_every`).
The cost of this check is the extra time of the step, and of the step before it, which computes a
fingerprint. The cost is printed as a share of the time of `--replay_every` steps.
"""

import dataclasses
import functools
import pathlib
import tempfile
import time

from absl import app, flags, logging
import jax
import numpy as np

from cm3leon_jax.checkpoints.checkpoint import Checkpoints
from cm3leon_jax.configs import scenes
from cm3leon_jax.data.rows.loader import rows_of_samples
from cm3leon_jax.mesh import MeshConfig, create_mesh, shard
from cm3leon_jax.settings import Settings, settings_from_config
from cm3leon_jax.training.faults.replay import Replay
from cm3leon_jax.training.steps import compile_steps

_VARIANT = flags.DEFINE_string("variant", "15", "Variant of the config `scenes`: 15, long.")
_BLOCK = flags.DEFINE_integer("block", 20, "Steps per block.", lower_bound=2)
_BLOCKS = flags.DEFINE_integer("blocks", 8, "Number of blocks with a save.", lower_bound=1)
_REPLAY = flags.DEFINE_integer(
  "replay_every", 0, "Measure checked steps, one per this many steps.", 0
)


def make_batch(settings: Settings):
  """Returns a batch of random tokens."""
  rng = np.random.default_rng(0)
  length, vocab = settings.data.sequence_length, settings.vocab
  samples = [
    rng.integers(vocab.num_special, vocab.size, length + 1).astype(np.int32)
    for _ in range(settings.train.global_batch_size)
  ]
  rows = rows_of_samples(samples, length, vocab)
  return {name: shard(jax.numpy.asarray(x), "batch", "length") for name, x in rows.items()}


def measure(settings: Settings, every: int, blocks: int, folder: pathlib.Path) -> list[dict]:
  """Measures steps in `2 * blocks` blocks, of which every second begins with a save.

  Returns:
    For each block, times in seconds: `save` is the time for which the save stopped the loop (0
    without a save), `in_flight` lists the times of steps during the save, and `alone` the times of
    the other steps.
  """
  steps = compile_steps(settings.model, settings.optimizer, settings.train, settings.vocab, 0)
  take_step = functools.partial(steps.train, num_sources=0)
  batch, state = make_batch(settings), steps.init()
  results = []
  with Checkpoints(folder, keep=2) as checkpoints:
    for block in range(-1, 2 * blocks):  # The first block compiles.
      found: dict = {"save": 0.0, "in_flight": [], "alone": []}
      begin = time.perf_counter()
      saved = block % 2 == 1 and block > 0
      if saved:
        checkpoints.save(state, block, 0)
        found["save"] = time.perf_counter() - begin
      sealed = folder / "checkpoints.digests" / f"{block}.json"
      for _ in range(every):
        in_flight = saved and not sealed.exists()
        start = time.perf_counter()
        state, metrics = take_step(state, batch)
        jax.block_until_ready(metrics)
        checkpoints.check_save()
        found["in_flight" if in_flight else "alone"].append(time.perf_counter() - start)
      results.append(found)
  return results[1:]


def measure_replay(settings: Settings, every: int, blocks: int) -> tuple[list, list, list]:
  """Measures blocks of steps; the last step of each block is checked.

  Returns:
    Lists of times in seconds: of ordinary steps, of steps before a checked step, and of checked
    steps.
  """
  steps = compile_steps(settings.model, settings.optimizer, settings.train, settings.vocab, 0)
  config = dataclasses.replace(settings.train, replay_every=every)
  take_step = Replay(steps, config, 0, jax.sharding.get_mesh())
  batch, state = make_batch(settings), steps.init()
  found: tuple[list, list, list] = ([], [], [])
  for i in range((blocks + 1) * every):
    start = time.perf_counter()
    state, metrics = take_step(state, batch)
    jax.block_until_ready(metrics)
    if i >= every:  # The first block compiles.
      found[max(0, i % every - every + 3)].append(time.perf_counter() - start)
  if take_step.faults:
    raise RuntimeError("; ".join(take_step.faults))
  return found


def print_replay(found: tuple[list, list, list], every: int) -> None:
  """Prints the cost of one checked step per `every` steps."""
  alone, before, checked = found
  step = np.median(alone)
  print(f"ordinary steps: {spread(alone)}, {len(alone)} steps")
  print(
    f"steps before a checked step: {spread(before)}; checked steps: {spread(checked)}, "
    f"{len(checked)} steps"
  )
  costs = sorted(100 * (a + b - 2 * step) / (every * step) for a, b in zip(before, checked))
  print(
    f"a checked step every {every} steps costs {np.median(costs):.2f}% of their time "
    f"({costs[0]:.2f} to {costs[-1]:.2f})"
  )


def spread(values: list[float]) -> str:
  """Formats the median and the 10th and 90th percentiles of times in seconds."""
  low, middle, high = 1e3 * np.percentile(values, [10, 50, 90]) if values else [0, 0, 0]
  return f"median {middle:.1f} ms (10th to 90th percentile {low:.1f} to {high:.1f})"


def main(_) -> None:
  settings = settings_from_config(scenes.get_config(_VARIANT.value))
  logging.set_verbosity(logging.WARNING)  # Orbax logs every file that it writes.
  if _REPLAY.value:
    with jax.set_mesh(create_mesh(MeshConfig())):
      print_replay(measure_replay(settings, _BLOCK.value, _BLOCKS.value), _REPLAY.value)
    return
  with jax.set_mesh(create_mesh(MeshConfig())), tempfile.TemporaryDirectory() as folder:
    results = measure(settings, _BLOCK.value, _BLOCKS.value, pathlib.Path(folder))
  without, saved = results[::2], results[1::2]
  alone = [x for block in without for x in block["alone"]]
  in_flight = [x for block in saved for x in block["in_flight"]]
  print(f"steps without a save: {spread(alone)}, {len(alone)} steps")
  print(f"steps while a save is in flight: {spread(in_flight)}, {len(in_flight) / len(saved):.1f}")
  print(f"save() in the loop: {spread([block['save'] for block in saved])}")
  step, every = np.median(alone), settings.train.checkpoint_every
  seconds = [b["save"] + sum(x - step for x in b["in_flight"]) for b in saved]
  costs = sorted(100 * x / (every * step) for x in seconds)
  print(
    f"a save every {every} steps costs {np.median(costs):.2f}% of their time "
    f"({costs[0]:.2f} to {costs[-1]:.2f}, {len(costs)} saves)"
  )


if __name__ == "__main__":
  app.run(main)

r"""Measures a train step: time, tokens/s, and the share of the measured peak FLOP/s.

  python -m benchmarks.speed.train_step
  python -m benchmarks.speed.train_step --layers=24 --width=1024 --heads=16 --mlp_width=4096 \
    --rows=8 --length=4096 --dtype=bfloat16

The default sizes are those that docs/benchmarks.md compares with MaxText. Rows are random tokens.
With `--clock=processor`, seconds are those of the process on all cores, for a machine that others
use, too.
"""

from collections.abc import Callable, Mapping
import functools
import time
from typing import Any

from absl import app, flags
import jax
import jax.numpy as jnp
import numpy as np

from cm3leon_jax.config.model import ATTENTIONS, DTYPES, REMAT_POLICIES, ModelConfig
from cm3leon_jax.config.training import OptimizerConfig
from cm3leon_jax.data.rows.loader import rows_of_samples
from cm3leon_jax.mesh import MeshConfig, create_mesh, shard
from cm3leon_jax.training.step.optimizer import create_optimizer
from cm3leon_jax.training.step.state import init_state, train_step
from cm3leon_jax.training.watch.flops import device_peak, model_flops
from cm3leon_jax.vocab import VocabLayout

_LAYERS = flags.DEFINE_integer("layers", 4, "Number of layers.")
_WIDTH = flags.DEFINE_integer("width", 256, "Width.")
_HEADS = flags.DEFINE_integer("heads", 4, "Number of attention heads.")
_MLP_WIDTH = flags.DEFINE_integer("mlp_width", 1_024, "Width of the feed-forward layer.")
_VOCAB = flags.DEFINE_integer("vocab", 64_512, "Number of ids.")
_ROWS = flags.DEFINE_integer("rows", 4, "Rows per batch.")
_LENGTH = flags.DEFINE_integer("length", 512, "Tokens per row.")
_FAMILY = flags.DEFINE_enum("family", "opt", ["opt", "modern"], "Family of the decoder.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", DTYPES, "Compute dtype.")
_REMAT = flags.DEFINE_enum(
  "remat_policy", "none", REMAT_POLICIES, "Which values the backward pass recomputes."
)
_ATTENTION = flags.DEFINE_enum("attention", "auto", ATTENTIONS, "Implementation of attention.")
_CHUNK = flags.DEFINE_integer("loss_chunk", 32, "Tokens per row in a chunk of logits.")
_OPTIMIZER = flags.DEFINE_enum("optimizer", "adamw", ["adamw", "muon"], "Optimizer.")
_UNROLL = flags.DEFINE_bool("unroll_layers", False, "Unroll the loop over layers.")
_STEPS = flags.DEFINE_integer("steps", 15, "Timed steps, after two untimed steps.")
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
_CLOCK = flags.DEFINE_enum("clock", "wall", list(CLOCKS), "Clock that measures seconds.")
_PEAK = flags.DEFINE_integer("peak_size", 4_096, "Side of the matrices that measure the peak.")
_SECONDS = flags.DEFINE_float("seconds", 0.0, "Take more timed steps until this many seconds.")


def measured_peak(dtype, size: int = 4_096, repeats: int = 7, clock=time.perf_counter) -> float:
  """Measures peak FLOP/s on one device: the fastest of `repeats` [size, size] matrix products."""
  a = jnp.ones((size, size), dtype)
  product = jax.jit(jnp.matmul)
  product(a, a).block_until_ready()
  seconds = []
  for _ in range(repeats):
    start = clock()
    product(a, a).block_until_ready()
    seconds.append(clock() - start)
  return 2 * size**3 / min(seconds)


def step_seconds(
  model: ModelConfig,
  rows: int,
  length: int,
  steps: int,
  least: float = 0.0,
  clock: Callable[[], float] = time.perf_counter,
  optimizer_name: str = "adamw",
) -> list[float]:
  """Measures the seconds of each of `steps` train steps on random tokens.

  Takes more steps until their sum is at least `least` seconds. Prints the memory of a step.
  """
  optimizer = create_optimizer(OptimizerConfig(name=optimizer_name), 1_000)
  rng = np.random.default_rng(0)
  samples = [rng.integers(256, model.vocab_size, length + 1).astype(np.int32) for _ in range(rows)]
  batch = {
    name: shard(jnp.asarray(x), "batch", "length")
    for name, x in rows_of_samples(samples, length, VocabLayout()).items()
  }
  state = jax.jit(functools.partial(init_state, model, optimizer))(jax.random.key(0))
  step = jax.jit(
    functools.partial(train_step, model, optimizer, model.vocab_size, 1), donate_argnums=0
  )
  compiled = step.lower(state, batch).compile()
  seconds: list[float] = []
  while len(seconds) < steps + 2 or sum(seconds[2:]) < least:
    start = clock()
    state, metrics = compiled(state, batch)
    float(metrics["loss"])
    seconds.append(clock() - start)
  print(memory_line(compiled.memory_analysis(), jax.devices()[0].memory_stats()))
  return seconds[2:]


def memory_line(expected: Any, measured: Mapping[str, int] | None) -> str:
  """Compares the memory of a compiled step (`memory_analysis`) with that of the device."""
  arrays = expected.argument_size_in_bytes, expected.temp_size_in_bytes
  peak = (measured or {}).get("peak_bytes_in_use")
  seen = f"the device's peak was {peak / 2**30:.2f}" if peak else "the device measures none"
  arguments, temporaries = (n / 2**30 for n in arrays)
  return (
    f"memory of a step: the compiler expects arguments {arguments:.2f} + temporaries "
    f"{temporaries:.2f} = {arguments + temporaries:.2f} GiB; {seen}"
  )


def main(_) -> None:
  model = ModelConfig(
    family=_FAMILY.value,
    vocab_size=_VOCAB.value,
    num_layers=_LAYERS.value,
    width=_WIDTH.value,
    num_heads=_HEADS.value,
    mlp_width=_MLP_WIDTH.value,
    max_positions=_LENGTH.value,
    dtype=_DTYPE.value,
    remat_policy=_REMAT.value,
    attention=_ATTENTION.value,
    loss_chunk=_CHUNK.value,
    unroll_layers=_UNROLL.value,
  )
  tokens = _ROWS.value * _LENGTH.value
  flops = model_flops(model, tokens, _LENGTH.value)
  with jax.set_mesh(create_mesh(MeshConfig())):
    clock = CLOCKS[_CLOCK.value]
    before = measured_peak(model.dtype, _PEAK.value, clock=clock)
    sizes = _ROWS.value, _LENGTH.value, _STEPS.value, _SECONDS.value
    seconds = step_seconds(model, *sizes, clock, _OPTIMIZER.value)
    peak = max(before, measured_peak(model.dtype, _PEAK.value, clock=clock)) * jax.device_count()
  median = float(np.median(seconds))
  print(
    f"{jax.device_count()} x {jax.devices()[0].device_kind}, "
    f"peak of {model.dtype} products {peak / 1e9:,.0f} GFLOP/s"
  )
  print(
    f"step: median {median:.3f} s ({min(seconds):.3f} to {max(seconds):.3f}, {len(seconds)} steps)"
  )
  print(
    f"{tokens / median:,.0f} tokens/s; {flops / 1e9:,.0f} model GFLOPs a step, "
    f"{flops / median / peak:.1%} of the peak"
  )
  published = device_peak(jax.devices()[0].device_kind)
  if published:
    share = flops / median / (jax.device_count() * published)
    print(f"MFU: {share:.1%} of the published peak in bfloat16, {published / 1e12:,.0f} TFLOP/s")


if __name__ == "__main__":
  app.run(main)

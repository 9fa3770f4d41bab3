"""Creates AdamW or Muon with clipping, warm-up and decay; updates the average of the parameters."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32
import optax
from optax.contrib import MuonDimensionNumbers, muon

from cm3leon_jax.config.training import OptimizerConfig
from cm3leon_jax.models.adapters import AXES
from cm3leon_jax.training.step.numerics import watch_norm

# Parameters that Muon updates, with the input and output axes of their matrices. The other axes
# stack matrices. `_factors` has those of adapters.
MATRICES = {
  **dict.fromkeys(("qkv", "q", "kv"), MuonDimensionNumbers((-3,), (-2, -1))),
  "out": MuonDimensionNumbers((-3, -2), (-1,)),
  "up": MuonDimensionNumbers((-2,), (-1,)),
  "gate": MuonDimensionNumbers((-2,), (-1,)),
  "down": MuonDimensionNumbers((-2,), (-1,)),
}
UPDATE_RMS = 0.2  # RMS to which Muon's updates are scaled; typical of AdamW (Liu et al. 2025).


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
  """Returns the learning rate as a function of the step. Warm-up takes at most half of the run."""
  warmup = min(config.warmup_steps, steps // 2)
  if config.schedule == "cosine":
    decay = optax.cosine_decay_schedule(
      config.learning_rate, max(1, steps - warmup), config.final_fraction
    )
  else:
    end, falling = config.learning_rate * config.final_fraction, steps - warmup
    if config.schedule == "wsd":
      falling = min(falling, round(config.decay_fraction * steps))
    decay = optax.linear_schedule(
      config.learning_rate, end, max(1, falling), steps - warmup - falling
    )
  return optax.join_schedules(
    [optax.linear_schedule(0.0, config.learning_rate, max(1, warmup)), decay], [warmup]
  )


def create_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
  """Creates the optimizer of a run of `steps` steps. Its state is sharded like the parameters."""
  without_decay = {"scale", "bias", *(() if config.decay_embeddings else ("embed", "positions"))}

  def decayed(params: dict) -> dict:
    return jax.tree.map_with_path(lambda path, _: path[-1].key not in without_decay, params)

  schedule, moment = learning_rate_schedule(config, steps), jnp.dtype(config.first_moment_dtype)
  if config.name == "adamw":
    transforms = [
      optax.adamw(
        schedule,
        config.b1,
        config.b2,
        config.eps,
        mu_dtype=moment,
        weight_decay=config.weight_decay,
        mask=decayed,
      )
    ]
  else:
    directions = muon(
      learning_rate=-1.0,  # `scale_by_learning_rate` below applies the sign and the rate.
      mu_dtype=moment,
      adam_b1=config.b1,
      adam_b2=config.b2,
      eps=config.eps,
      muon_weight_dimension_numbers=_matrices,
      consistent_rms=UPDATE_RMS,
    )
    transforms = [
      _on_any_layout(directions),
      optax.add_decayed_weights(config.weight_decay, decayed),
      optax.scale_by_learning_rate(schedule),
    ]
  # `watch_norm` must see the norm before clipping. It is omitted if `skip_above` is 0, so that the
  # state has the same structure as in older checkpoints.
  watch = [watch_norm(config.skip_above)] if config.skip_above else []
  return optax.chain(*watch, optax.clip_by_global_norm(config.clip_norm), *transforms)


def _matrices(params: dict) -> dict:
  """Returns the axes of each parameter for Muon; None: AdamW updates the parameter."""

  def axes(path: tuple, _: Any) -> MuonDimensionNumbers | None:
    name = path[-1].key
    return _factors(path[-2].key)[name] if name in ("a", "b") else MATRICES.get(name)

  return jax.tree.map_with_path(axes, params)


def _factors(name: str) -> dict[str, MuonDimensionNumbers]:
  """Returns the axes of the two factors of the adapter of a matrix, see `adapters.init`."""
  ins, outs = (tuple(range(-len(axes), 0)) for axes in AXES[name])
  return {
    "a": MuonDimensionNumbers(tuple(i - 1 for i in ins), (-1,)),
    "b": MuonDimensionNumbers((-len(outs) - 1,), outs),
  }


def _on_any_layout(inner: optax.GradientTransformation) -> optax.GradientTransformation:
  """Lets the compiler choose the shardings inside `inner.update`.

  The updates and the new state keep the shardings that they had before.
  """

  def update(updates: dict, state: optax.OptState, params: dict) -> tuple[dict, optax.OptState]:
    if jax.sharding.get_abstract_mesh().empty:
      return inner.update(updates, state, params)
    layout = jax.tree.map(lambda x: jax.typeof(x).sharding, (updates, state))
    return jax.sharding.auto_axes(inner.update, out_sharding=layout)(updates, state, params)

  return optax.GradientTransformation(inner.init, update)


def update_average(average: dict, params: dict, decay: float, step: Int32[Array, ""]) -> dict:
  """Updates the exponential moving average of the parameters.

  The decay is min(decay, (1 + step) / (10 + step)), as in TensorFlow's ExponentialMovingAverage.

  Args:
    average: the average in fp32. In bfloat16, updates of a relative size of 1 - decay = 0.001 would
      be rounded to 0.
    params: parameters after the step, in fp32.
    decay: largest decay.
    step: number of the step, from 0.
  """
  # Equal to 1 - (1 + step) / (10 + step), but with a smaller rounding error.
  rate = jnp.maximum(1 - decay, 9 / (10 + step))
  return jax.tree.map(lambda x, new: x + rate * (new - x), average, params)

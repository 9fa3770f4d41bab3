"""AdamW or Muon with clipping, warm-up and decay, and the average of the parameters."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32
import optax
from optax.contrib import MuonDimensionNumbers, muon

from cm3leon_jax.training.config import OptimizerConfig
from cm3leon_jax.training.step.numerics import watch_norm

# The matrices that Muon updates: axes of what they map from and to; other axes stack matrices.
MATRICES = {
  "qkv": MuonDimensionNumbers((-3,), (-2, -1)),
  "out": MuonDimensionNumbers((-3, -2), (-1,)),
  "up": MuonDimensionNumbers((-2,), (-1,)),
  "gate": MuonDimensionNumbers((-2,), (-1,)),
  "down": MuonDimensionNumbers((-2,), (-1,)),
}
UPDATE_RMS = 0.2  # Of AdamW, about; Liu et al. 2025 give Muon the same.


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
  """Returns the learning rate as a function of the step; warm-up takes at most half of a run."""
  warmup = min(config.warmup_steps, steps // 2)
  if config.schedule == "cosine":
    decay = optax.cosine_decay_schedule(
      config.learning_rate, max(1, steps - warmup), config.final_fraction
    )
  else:
    end = config.learning_rate * config.final_fraction
    decay = optax.linear_schedule(config.learning_rate, end, max(1, steps - warmup))
  return optax.join_schedules(
    [optax.linear_schedule(0.0, config.learning_rate, max(1, warmup)), decay], [warmup]
  )


def create_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
  """Makes the optimizer of a run of `steps` steps; its state is laid out like the parameters."""
  without_decay = {"scale"} if config.decay_embeddings else {"scale", "embed", "positions"}

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
      learning_rate=-1.0,  # The last step has sign and rate.
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
  # Before the clipping. Without it the state has the layout of older checkpoints.
  watch = [watch_norm(config.skip_above)] if config.skip_above else []
  return optax.chain(*watch, optax.clip_by_global_norm(config.clip_norm), *transforms)


def _matrices(params: dict) -> dict:
  """Returns the dimensions of each matrix of `MATRICES`, and None for other parameters."""
  return jax.tree.map_with_path(lambda path, _: MATRICES.get(path[-1].key), params)


def _on_any_layout(inner: optax.GradientTransformation) -> optax.GradientTransformation:
  """Lets the compiler lay out the products of matrices that are split over a mesh.

  Updates and state keep the layout of the parameters.
  """

  def update(updates: dict, state: optax.OptState, params: dict) -> tuple[dict, optax.OptState]:
    if jax.sharding.get_abstract_mesh().empty:
      return inner.update(updates, state, params)
    layout = jax.tree.map(lambda x: jax.typeof(x).sharding, (updates, state))
    return jax.sharding.auto_axes(inner.update, out_sharding=layout)(updates, state, params)

  return optax.GradientTransformation(inner.init, update)


def update_average(average: dict, params: dict, decay: float, step: Int32[Array, ""]) -> dict:
  """Moves an exponential moving average towards the parameters.

  The decay is min(decay, (1 + step) / (10 + step)), as in TensorFlow's ExponentialMovingAverage.

  Args:
    average: in fp32 as the parameters: in bfloat16, a summand of 1 - decay = 0.001 would round
      to nothing.
    params: after the step.
    decay: largest decay.
    step: number of the step, from 0.
  """
  rate = jnp.maximum(1 - decay, 9 / (10 + step))  # 1 - the decay, without its rounding.
  return jax.tree.map(lambda x, new: x + rate * (new - x), average, params)

"""The state of training and one step of it."""

# B rows of the global batch, A accumulation steps, L length, S sources of rows.

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, Num, PyTree
import optax

from cm3leon_jax.mesh import spec
from cm3leon_jax.models import transformer
from cm3leon_jax.models.config import ModelConfig
from cm3leon_jax.training.step import loss, numerics
from cm3leon_jax.training.step.optimizer import update_average


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
  """Everything that a step changes: the int32 number of steps, and pure trees of arrays.

  `ema` is the exponential moving average of the parameters, laid out as they are, or None.
  """

  step: Any  # The types or shardings of a state's arrays are in a TrainState, too.
  params: dict
  opt_state: optax.OptState
  ema: Any = None  # A dict like `params`; in place of None Orbax puts a leaf of its own.

  @property
  def eval_params(self) -> dict:
    """Parameters that are evaluated, sampled from and exported: the average, if there is one."""
    return self.params if self.ema is None else self.ema


def init_state(
  config: ModelConfig,
  optimizer: optax.GradientTransformation,
  key: Key[Array, ""],
  averaged: bool = False,
) -> TrainState:
  """Initializes a state on the current mesh; under `jax.eval_shape` its types carry shardings."""
  params = transformer.init_params(config, key)
  ema = jax.tree.map(jnp.copy, params) if averaged else None
  return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), ema)


def train_step(
  config: ModelConfig,
  optimizer: optax.GradientTransformation,
  text_size: int,
  accumulation_steps: int,
  state: TrainState,
  batch: dict[str, loss.Ids | loss.Values],
  z_loss: float = 0.0,
  ema_decay: float = 0.0,
  num_sources: int = 0,
) -> tuple[TrainState, dict[str, loss.Scalar | loss.BySource]]:
  """Updates the state on a global batch.

  The loss is sum(weight x nll) / sum(weight) over the global batch, however it is accumulated.

  Args:
    config: of the model; static, like the next three.
    optimizer: of `create_optimizer`.
    text_size: first id of an image code.
    accumulation_steps: A, the number of micro-batches that the batch is split into.
    state: donated by the caller's jit.
    batch: rows of `data.rows.loader`.
    z_loss: static; see `loss.weighted_nll`.
    ema_decay: static; see `optimizer.update_average`. It counts if the state has an average.
    num_sources: static; S, if the rows are marked with their sources.

  Returns:
    New state, and metrics: loss, image_loss, text_loss (nats per target), weight, those of
    `apply_gradients`; of marked rows also the `loss.source_sums`.
  """
  total = jnp.maximum(jnp.sum(batch["loss_weights"]), 1e-9)
  # Layers are cast here and not where they are used: their gradients then stay in the compute
  # dtype, in which they are summed. Tables are cast where their rows are looked up: their gradients
  # are summed and kept in fp32.
  layers = {name: x for name, x in state.params.items() if name not in transformer.LOOKED_UP}
  params = {**state.params, **jax.tree.map(lambda x: x.astype(config.dtype), layers)}

  def loss_fn(
    params: dict, part: dict[str, loss.Ids | loss.Values]
  ) -> tuple[loss.Scalar, dict[str, loss.Scalar | loss.BySource]]:
    value, nll = loss.batch_nll(transformer.bind(config, params), part, z_loss)
    return value / total, loss.batch_sums(nll, part, text_size, num_sources)

  grad_fn = functools.partial(jax.grad(loss_fn, has_aux=True), params)
  if accumulation_steps == 1:
    grads, sums = _fp32(grad_fn(batch))
  else:
    grads, sums = _accumulated(grad_fn, state.params, batch, accumulation_steps)
  metrics = {**loss.modality_losses(sums), "weight": total}
  metrics |= {name: sums[name] for name in loss.SOURCE_SUMS if name in sums}
  state, applied = apply_gradients(optimizer, state, grads, metrics["loss"], ema_decay)
  return state, metrics | applied


def apply_gradients(
  optimizer: optax.GradientTransformation,
  state: TrainState,
  grads: dict,
  value: loss.Scalar,
  ema_decay: float,
) -> tuple[TrainState, dict[str, loss.Scalar]]:
  """Updates the state, unless the numbers of the step are not sound (`numerics.is_sound`).

  A step that is skipped leaves parameters, optimizer and average bit for bit as they were, as if
  there had been no such batch: the optimizer's own count of steps, which its schedule and Adam's
  correction of bias follow, does not move either. Only `state.step` does, which says how many
  batches were read.

  Args:
    optimizer: of `create_optimizer`.
    state: before the step.
    grads: fp32, laid out as the parameters.
    value: the loss.
    ema_decay: see `update_average`.

  Returns:
    New state, and metrics: grad_norm, and skipped, 0 or 1.
  """
  norm = optax.tree.norm(grads)
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  ema = state.ema
  if ema is not None:
    ema = update_average(ema, params, ema_decay, state.step)
  sound = numerics.is_sound(value, norm, opt_state)
  old = (state.params, state.opt_state, state.ema)
  new = numerics.select(sound, (params, opt_state, ema), old)
  metrics = {"grad_norm": norm, "skipped": 1 - sound.astype(jnp.float32)}
  return TrainState(state.step + 1, *new), metrics


def _accumulated(
  grad_fn: Callable[[dict], tuple[dict, dict]], params: dict, batch: dict, accumulation_steps: int
) -> tuple[dict, dict]:
  """Sums the results of `grad_fn`, (gradients, sums), over the micro-batches of a batch.

  Args:
    grad_fn: batch -> gradients, sums.
    params: fp32, laid out as the gradients.
    batch: [B, L] arrays.
    accumulation_steps: A.
  """

  def split(x: Num[Array, "B L"]) -> Num[Array, "A rows L"]:
    shape, axes = (-1, accumulation_steps, x.shape[1]), spec("batch", None, "length")
    return x.reshape(shape, out_sharding=axes).swapaxes(0, 1)

  parts = jax.tree.map(split, batch)
  # The sum starts at zeros, not at the first gradients, so that a micro-batch is traced once.
  zeros = jax.tree.map(jnp.zeros_like, params)

  def add(grads: dict, part: dict) -> tuple[dict, dict]:
    part_grads, part_sums = _fp32(grad_fn(part))
    return jax.tree.map(jnp.add, grads, part_grads), part_sums

  grads, sums = jax.lax.scan(add, zeros, parts)
  return grads, jax.tree.map(lambda x: jnp.sum(x, 0), sums)


def _fp32(tree: PyTree) -> PyTree:
  return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def eval_step(
  config: ModelConfig,
  text_size: int,
  params: dict,
  batch: dict[str, loss.Ids | loss.Values],
  num_sources: int = 0,
) -> dict[str, loss.Scalar | loss.BySource]:
  """Computes the `loss.batch_sums` of a batch; sums of batches may be added."""
  _, nll = loss.batch_nll(transformer.bind(config, params), batch)
  return loss.batch_sums(nll, batch, text_size, num_sources)

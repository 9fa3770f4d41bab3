"""Defines the training state and the jittable functions of a training step."""

# B rows of the global batch, A accumulation steps, L length, S sources of rows.

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, Num, PyTree
import optax

from cm3leon_jax.config.groups import Tuned
from cm3leon_jax.config.model import AdapterConfig, ModelConfig
from cm3leon_jax.mesh import spec
from cm3leon_jax.models import adapters, groups, transformer
from cm3leon_jax.training.step import loss, numerics
from cm3leon_jax.training.step.optimizer import update_average


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
  """Training state: everything that a step changes.

  Attributes:
    step: number of steps so far, an int32 scalar.
    params: the trained parameters: those of the decoder, some of them, or only its adapters.
    ema: exponential moving average of the parameters, sharded like `params`, or None.
  """

  step: Any  # Not annotated as an array: a TrainState can also contain types or shardings.
  params: dict
  opt_state: optax.OptState
  ema: Any = None  # Not annotated as a dict, because Orbax replaces None by a leaf.

  @property
  def eval_params(self) -> dict:
    """Parameters to evaluate, sample from and export: the average if it exists, else `params`."""
    return self.params if self.ema is None else self.ema


def init_state(
  config: ModelConfig,
  optimizer: optax.GradientTransformation,
  key: Key[Array, ""],
  averaged: bool = False,
  tuned: Tuned | None = None,
) -> TrainState:
  """Initializes a state on the current mesh. Under `jax.eval_shape` it returns sharded types.

  `tuned` says what is trained of a frozen model; None: all parameters are trained.
  """
  params = groups.init(config, tuned, key)
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
  base: dict | None = None,
  tuned: Tuned | None = None,
) -> tuple[TrainState, dict[str, loss.Scalar | loss.BySource]]:
  """Updates the state on a global batch.

  The loss is sum(weight x nll) / sum(weight) over the global batch, for any `accumulation_steps`.

  Args:
    config: static, as all arguments before `state`.
    text_size: first id of an image code.
    accumulation_steps: A, the number of micro-batches that the batch is split into.
    state: donated by the caller's jit.
    z_loss: static; see `loss.weighted_nll`.
    ema_decay: static; see `optimizer.update_average`. Used only if the state has an average.
    num_sources: static; S, or 0 if rows do not name their sources.
    base: the decoder's frozen parameters in the compute dtype, if not all are trained.
    tuned: static; what is trained; None: all parameters.

  Returns:
    The new state, and metrics: loss, image_loss, text_loss (nats per target), weight (sum of the
    loss weights), and the metrics of `apply_gradients`. If `num_sources` > 0, also the
    `loss.source_sums`.
  """
  total = jnp.maximum(jnp.sum(batch["loss_weights"]), 1e-9)
  # The layers' parameters are cast here, outside of the gradient, so that their gradients are
  # summed and kept in the compute dtype. Tables are cast where their rows are looked up, so that
  # their gradients are summed and kept in fp32.
  params = state.params
  if not isinstance(tuned, AdapterConfig):
    layers = {name: x for name, x in params.items() if name not in transformer.LOOKED_UP}
    params = {**params, **jax.tree.map(lambda x: x.astype(config.dtype), layers)}

  def loss_fn(
    params: dict, part: dict[str, loss.Ids | loss.Values]
  ) -> tuple[loss.Scalar, dict[str, loss.Scalar | loss.BySource]]:
    model, more = _bound(config, params, base, tuned)
    value, nll = loss.batch_nll(model, part, z_loss, **more)
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
  """Updates the state, or skips the step if `numerics.is_sound` is False.

  A skipped step leaves the parameters, the optimizer's state and the average bitwise unchanged, as
  if the batch did not exist. The optimizer's step count, which sets the learning rate and Adam's
  bias correction, does not advance. Only `state.step`, which counts batches, advances. `grads` are
  in fp32 and sharded like the parameters, and `value` is the loss. The metrics are grad_norm and
  skipped (0 or 1).
  """
  norm = optax.tree.norm(grads)
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  ema = state.ema
  if ema is not None:
    ema = update_average(ema, params, ema_decay, state.step)
  sound = numerics.is_sound(value, norm, opt_state)
  old = (state.params, state.opt_state, state.ema)
  # The compiler fuses the selection into the computation of the new arrays, so that no array is
  # copied and the old ones may be donated. A `jax.lax.cond` would need memory for both.
  new = jax.tree.map(functools.partial(jax.lax.select, sound), (params, opt_state, ema), old)
  metrics = {"grad_norm": norm, "skipped": 1 - sound.astype(jnp.float32)}
  return TrainState(state.step + 1, *new), metrics


def _accumulated(
  grad_fn: Callable[[dict], tuple[dict, dict]], params: dict, batch: dict, accumulation_steps: int
) -> tuple[dict, dict]:
  """Adds up the gradients and the sums that `grad_fn` returns for A micro-batches.

  The gradients have the shapes and shardings of `params`, in fp32.
  """

  def split(x: Num[Array, "B L"]) -> Num[Array, "A rows L"]:
    shape, axes = (-1, accumulation_steps, x.shape[1]), spec("batch", None, "length")
    return x.reshape(shape, out_sharding=axes).swapaxes(0, 1)

  parts = jax.tree.map(split, batch)
  # Start from zeros, not from the first gradients, so that `grad_fn` is traced only once.
  zeros = jax.tree.map(jnp.zeros_like, params)

  def add(grads: dict, part: dict) -> tuple[dict, dict]:
    part_grads, part_sums = _fp32(grad_fn(part))
    return jax.tree.map(jnp.add, grads, part_grads), part_sums

  grads, sums = jax.lax.scan(add, zeros, parts)
  return grads, jax.tree.map(lambda x: jnp.sum(x, 0), sums)


def _bound(
  config: ModelConfig, params: dict, base: dict | None, tuned: Tuned | None
) -> tuple[transformer.Transformer, dict[str, Any]]:
  """Returns the model, and the arguments of `loss.batch_nll` that say what is trained."""
  if tuned is None or base is None:
    return transformer.bind(config, params), {}
  if isinstance(tuned, AdapterConfig):
    factors = adapters.scaled(params, tuned.alpha)
    return transformer.bind(config, base), {"adapters": factors, "wanted": loss.Wanted(True, None)}
  joined = groups.join(base, params, tuned)
  model = transformer.bind(config, joined)
  row = tuned.first_row("embed" if config.traits.tied else "head")
  more = {"wanted": loss.Wanted(tuned.backward(config) > 0, row)}
  if "layers" in tuned.names:
    return model, more
  if not (trained := tuned.layers(config)):
    return model, {**more, "adapters": {}}
  own = transformer.bind(config, {**joined, "blocks": params["blocks"]}).blocks
  segments: transformer.Segments = [(own, None)]
  if trained.start:
    segments.insert(0, (jax.tree.map(lambda x: x[: trained.start], model.blocks), {}))
  if trained.stop < config.num_layers:
    segments.append((jax.tree.map(lambda x: x[trained.stop :], model.blocks), {}))
  return model, {**more, "segments": segments}


def _fp32(tree: PyTree) -> PyTree:
  return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def eval_step(
  config: ModelConfig,
  text_size: int,
  params: dict,
  batch: dict[str, loss.Ids | loss.Values],
  num_sources: int = 0,
  base: dict | None = None,
  tuned: Tuned | None = None,
) -> dict[str, loss.Scalar | loss.BySource]:
  """Computes the `loss.batch_sums` of a batch; sums of several batches can be added.

  For `base` and `tuned`, see `train_step`.
  """
  model, more = _bound(config, params, base, tuned)
  _, nll = loss.batch_nll(model, batch, **more)
  return loss.batch_sums(nll, batch, text_size, num_sources)

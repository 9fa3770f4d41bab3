"""The state of training and one step of it."""

# B global batch, A accumulation steps, L length.

import dataclasses

import jax
import jax.numpy as jnp
import optax

from cm3leon_jax.mesh import spec
from cm3leon_jax.models import transformer
from cm3leon_jax.models.config import ModelConfig
from cm3leon_jax.training import loss


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
  """Everything that a step changes. step: int32 scalar; params, opt_state: pure trees of arrays."""

  step: jax.Array
  params: dict
  opt_state: optax.OptState


def init_state(config: ModelConfig, optimizer: optax.GradientTransformation, key) -> TrainState:
  """A fresh state on the current mesh; under `jax.eval_shape` its types carry the shardings."""
  params = transformer.init_params(config, key)
  return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def train_step(
  config: ModelConfig,
  optimizer,
  text_size: int,
  accumulation_steps: int,
  state: TrainState,
  batch,
  z_loss: float = 0.0,
):
  """One update on a global batch.

  The loss is sum(weight x nll) / sum(weight) over the global batch, however it is accumulated.

  Args:
    config: static, like the three that follow.
    optimizer: of `create_optimizer`.
    text_size: first id of an image code.
    accumulation_steps: A, parts that the batch is split into.
    state: donated by the caller's jit.
    batch: [B, L] arrays, see `data.pipeline`.
    z_loss: static; see `loss.weighted_nll`.

  Returns:
    New state, and fp32 scalars: loss, image_loss, text_loss (nats per target), grad_norm, weight.
  """
  total = jnp.maximum(jnp.sum(batch["loss_weights"]), 1e-9)
  # Cast here and not where they are used: gradients are then kept in the compute dtype, in which they were summed.
  # Tables are cast where their rows are looked up: their gradients are summed and kept in fp32.
  layers = {name: x for name, x in state.params.items() if name not in transformer.LOOKED_UP}
  params = {**state.params, **jax.tree.map(lambda x: x.astype(config.dtype), layers)}

  def loss_fn(params, part):
    value, nll = loss.batch_nll(transformer.bind(config, params), part, z_loss)
    return value / total, loss.modality_sums(nll, part["targets"], part["loss_weights"], text_size)

  grad_fn = lambda part: jax.grad(loss_fn, has_aux=True)(params, part)
  if accumulation_steps == 1:
    grads, sums = _fp32(grad_fn(batch))
  else:
    split = lambda x: x.reshape(
      -1, accumulation_steps, x.shape[1], out_sharding=spec("batch", None, "length")
    ).swapaxes(0, 1)
    parts = jax.tree.map(split, batch)
    # From zeros, not from the first part's gradients: so a part is traced and compiled once.
    zeros = jax.tree.map(jnp.zeros_like, state.params)

    def add(grads, part):
      part_grads, part_sums = _fp32(grad_fn(part))
      return jax.tree.map(jnp.add, grads, part_grads), part_sums

    grads, sums = jax.lax.scan(add, zeros, parts)
    sums = jax.tree.map(lambda x: jnp.sum(x, 0), sums)
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  metrics = {**loss.modality_losses(sums), "grad_norm": optax.tree.norm(grads), "weight": total}
  return TrainState(state.step + 1, params, opt_state), metrics


def _fp32(tree):
  return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def eval_step(config: ModelConfig, text_size: int, params, batch) -> dict:
  """Sums of nll and weight by modality, to be added up over batches. See `loss.modality_sums`."""
  _, nll = loss.batch_nll(transformer.bind(config, params), batch)
  return loss.modality_sums(nll, batch["targets"], batch["loss_weights"], text_size)

"""Optimizes a policy over image codes with group-relative rewards (GRPO, Shao et al. 2024).

The samples of one prompt form a group (arXiv:2402.03300). A sample's advantage is its reward minus
the group mean. It is not divided by the group's standard deviation, which would give more weight to
prompts that are almost always right or wrong (Dr. GRPO, arXiv:2503.20783). The policy is the
distribution that codes are sampled from: the combined guidance streams, restricted to image codes.
Each batch of samples is used for one step only, so the probability ratio to the sampling policy is
1 and needs no clipping.
"""

# B samples, S guidance streams, I codes of an image, C image codes, D width, L tokens of a row:
# padding, the prompts without their last tokens, and S x I tokens that predict codes.

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32
import numpy as np
import optax

from cm3leon_jax.config.model import ModelConfig
from cm3leon_jax.config.training import OptimizerConfig, ReinforceConfig
from cm3leon_jax.mesh import RULES, shard, spec
from cm3leon_jax.models import transformer
from cm3leon_jax.models.attention import wide
from cm3leon_jax.training.step.optimizer import create_optimizer
from cm3leon_jax.training.step.state import TrainState, apply_gradients
from cm3leon_jax.xla_options import compiler_options

BUCKET = 32  # Rows are padded to multiples of this length, so that few shapes are compiled.
# Attention kernels need multiples of LONG_BUCKET. Rows of at most LONG tokens would be mostly
# padding then, and are fast enough without kernels.
LONG, LONG_BUCKET = 1024, 128


class Rollout(NamedTuple):
  """The samples of a step. A row has all guidance streams of a sample.

  A row begins with padding, and with the prompt of each stream without its last token. S blocks of
  I tokens follow: the last token of a stream's prompt, and all codes except the last. So the last
  S x I tokens of a row predict the codes.

  Attributes:
    inputs: ids of these tokens.
    positions: index of each token in its stream; 0 at padding.
    segment_ids: s at the tokens of the s-th stream, 0 at padding.
    codes: the sampled codes, counted from 0.
    guidance: weights of the S guidance streams at each code.
    advantages: see `advantages`.
  """

  inputs: Int32[Array, "B L"] | np.ndarray
  positions: Int32[Array, "B L"] | np.ndarray
  segment_ids: Int32[Array, "B L"] | np.ndarray
  codes: Int32[Array, "B I"] | np.ndarray
  guidance: Float32[Array, "B I S"] | np.ndarray
  advantages: Float32[Array, " B"] | np.ndarray


def advantages(rewards: Float[np.ndarray, "N G"]) -> Float32[np.ndarray, "N G"]:
  """Computes the advantages of the G samples of each of N prompts.

  rewards [[0 1] [1 1]] -> [[-0.5 0.5] [0 0]]
  """
  rewards = np.asarray(rewards, np.float64)
  return (rewards - rewards.mean(1, keepdims=True)).astype(np.float32)


def row_length(prompt_tokens: int, streams: int, image_tokens: int) -> int:
  """Returns the padded length of a row. `prompt_tokens` is the sum over the prompts of a row."""
  length = prompt_tokens + streams * (image_tokens - 1)
  bucket = LONG_BUCKET if length > LONG else BUCKET
  return -(-length // bucket) * bucket


def pack_rows(
  rows: Sequence[Sequence[tuple[np.ndarray, np.ndarray]]], image_tokens: int, pad: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Packs the streams of each sample into a row, see `Rollout`.

  A stream is (ids, positions), for a prompt and all codes of its image. Each row must have the same
  number of streams. Returns the inputs, positions and segment_ids of a `Rollout`.
  """
  prompts = max(sum(len(ids) - image_tokens for ids, _ in row) for row in rows)
  length, split = row_length(prompts, len(rows[0]), image_tokens), -image_tokens - 1
  packed = np.zeros((3, len(rows), length), np.int32)
  packed[0] = pad
  for packed_row, streams in zip(packed.swapaxes(0, 1), rows):
    parts = [np.stack([ids, at, np.full_like(ids, s)]) for s, (ids, at) in enumerate(streams, 1)]
    tokens = np.concatenate([x[:, :split] for x in parts] + [x[:, split:-1] for x in parts], axis=1)
    packed_row[:, length - tokens.shape[1] :] = tokens
  return packed[0], packed[1], packed[2]


def place(rollout: Rollout) -> Rollout:
  """Shards the arrays of a rollout over the current mesh. Every process must pass all rows."""
  mesh = jax.sharding.get_mesh()

  def put(x: np.ndarray) -> Array:
    axes = spec("batch", *[None] * (x.ndim - 1))
    sharding = jax.sharding.NamedSharding(mesh, axes)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

  return Rollout(*(put(np.asarray(x)) for x in rollout))


def guided_log_probs(
  config: ModelConfig, text_size: int, temperature: float, params: dict, rollout: Rollout
) -> Float32[Array, "B I C"]:
  """Computes the log-probability of every image code at each code position of the samples.

  `config`, `text_size` and `temperature` are static. `text_size` is the first id of an image code,
  and the guided logits are divided by `temperature`.
  """
  B, image_tokens, S = rollout.guidance.shape
  model = transformer.bind(config, params)
  hidden = model(rollout.inputs, rollout.positions, rollout.segment_ids)
  states = hidden[:, -S * image_tokens :].astype(wide(hidden.dtype))
  shape = (B, S, image_tokens, states.shape[-1])
  states = states.reshape(shape, out_sharding=spec("batch", None, None, "act"))
  # Logits are linear in the hidden states, which are smaller than logits.
  guided = jnp.sum(states * rollout.guidance.swapaxes(1, 2)[..., None], axis=1)
  table = shard(model.output_table(), None, None)[text_size:].astype(states.dtype)
  devices = jax.sharding.get_abstract_mesh().shape[RULES["vocab"]]
  axis = None if len(table) % devices else "vocab"
  logits = jnp.einsum(
    "BID,CD->BIC", guided, shard(table, axis, None), out_sharding=spec("batch", None, axis)
  )
  return jax.nn.log_softmax(logits / temperature, axis=-1)


def _chosen(log_probs: Float32[Array, "B I C"], rollout: Rollout) -> Float32[Array, "B I"]:
  ids = jnp.arange(log_probs.shape[-1], dtype=rollout.codes.dtype)
  return jnp.sum(jnp.where(rollout.codes[..., None] == ids[None, None], log_probs, 0), -1)


def policy_loss(
  config: ModelConfig,
  text_size: int,
  kl_weight: float,
  temperature: float,
  params: dict,
  reference: Float32[Array, "B I C"],
  rollout: Rollout,
) -> tuple[Float32[Array, ""], dict[str, Float32[Array, ""]]]:
  """Computes -mean(advantage x log-probability) + kl_weight x KL(reference || policy).

  Both terms are means over codes. The KL is exact: it sums over all image codes of the vocabulary.
  `reference` has the log-probabilities of the reference; for the other arguments, see
  `policy_step`. Returns the loss, and its metrics.
  """
  log_probs = guided_log_probs(config, text_size, temperature, params, rollout)
  chosen = _chosen(log_probs, rollout)
  kl = jnp.mean(jnp.sum(jnp.exp(reference) * (reference - log_probs), -1))
  value = -jnp.mean(rollout.advantages[:, None] * chosen) + kl_weight * kl
  return value, {"loss": value, "image_loss": -jnp.mean(chosen), "kl": kl}


def policy_step(
  config: ModelConfig,
  optimizer: optax.GradientTransformation,
  text_size: int,
  kl_weight: float,
  temperature: float,
  state: TrainState,
  reference: dict,
  rollout: Rollout,
  ema_decay: float = 0.0,
) -> tuple[TrainState, dict[str, Float32[Array, ""]]]:
  """Updates a state by training it on samples that were drawn with its parameters.

  Only `state.step` changes if all advantages are 0.

  Args:
    config: static, as all arguments before `state`.
    text_size: first id of an image code.
    kl_weight: see `ReinforceConfig`.
    temperature: temperature at which the samples were drawn.
    state: donated by the caller's jit.
    ema_decay: static; see `optimizer.update_average`.

  Returns:
    The new state, and metrics: loss, image_loss (nats per sampled code), text_loss (0), kl, weight
    (the number of codes), and the metrics of `state.apply_gradients`.
  """
  layers = {name: x for name, x in state.params.items() if name not in transformer.LOOKED_UP}
  params = {**state.params, **jax.tree.map(lambda x: x.astype(config.dtype), layers)}
  of_reference = guided_log_probs(config, text_size, temperature, reference, rollout)
  loss_fn = functools.partial(
    policy_loss,
    *(config, text_size, kl_weight, temperature),
    reference=of_reference,
    rollout=rollout,
  )
  grads, metrics = jax.grad(loss_fn, has_aux=True)(params)
  grads = jax.tree.map(lambda x: x.astype(jnp.float32), grads)
  metrics |= {"text_loss": jnp.zeros(()), "weight": jnp.float32(rollout.codes.size)}
  new, applied = apply_gradients(optimizer, state, grads, metrics["loss"], ema_decay)
  # If all advantages are 0, the gradient is rounding noise, of which Adam would make whole updates.
  teaches, same = jnp.any(rollout.advantages != 0), dataclasses.replace(state, step=new.step)
  state = jax.tree.map(functools.partial(jax.lax.select, teaches), new, same)
  return state, metrics | applied


def compile_step(
  model: ModelConfig,
  optimizer_config: OptimizerConfig,
  config: ReinforceConfig,
  steps: int,
  text_size: int,
) -> Callable:
  """Builds `policy_step` for the current mesh. JAX compiles it at its first call.

  Returns (state, reference, rollout) -> (state, metrics); the state is donated.
  """
  step = functools.partial(
    policy_step,
    model,
    create_optimizer(optimizer_config, steps),
    text_size,
    config.kl_weight,
    config.temperature,
    ema_decay=optimizer_config.ema_decay,
  )
  return jax.jit(step, donate_argnums=0, compiler_options=compiler_options(jax.sharding.get_mesh()))

"""A tiny decoder whose outputs are not tiny, and helpers to run it on a mesh."""

import functools

import jax
import jax.numpy as jnp

from cm3leon_jax.mesh import MeshConfig, create_mesh, shard
from cm3leon_jax.models import transformer
from cm3leon_jax.models.config import ModelConfig

CONFIG = ModelConfig(
  vocab_size=96,
  num_layers=3,
  width=32,
  num_heads=4,
  mlp_width=64,
  max_positions=32,
  dtype="float32",
  remat_policy="none",
  loss_chunk=8,
)


def mesh_of(*shape):
  size = shape[0] * shape[1] * shape[2]
  return create_mesh(MeshConfig(*shape), jax.devices()[:size])


def random_params(config, seed=0, std=0.2):
  """Parameters of the config's layout drawn from N(0, std), residual outputs included."""
  params = transformer.init_params(config, jax.random.key(seed))
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
  draw = lambda k, x: std * jax.random.normal(k, x.shape, x.dtype, out_sharding=jax.typeof(x).sharding.spec)
  return jax.tree.unflatten(tree, [draw(k, x) for k, x in zip(keys, leaves)])


@functools.partial(jax.jit, static_argnums=0)
def model_logits(config, params, tokens, positions, segment_ids):
  """[B, L] arrays -> [B, L, V] logits on the current mesh."""
  tokens, positions, segment_ids = (shard(jnp.asarray(x), "batch", "length") for x in (tokens, positions, segment_ids))
  model = transformer.bind(config, params)
  return transformer.logits(model(tokens, positions, segment_ids), model.output_table())

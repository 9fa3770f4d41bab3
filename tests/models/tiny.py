"""Defines a tiny decoder with outputs that are not tiny, and helpers to run it on a mesh."""

import functools
import math

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from cm3leon_jax.config.model import ModelConfig
from cm3leon_jax.mesh import MeshConfig, create_mesh, shard, shardings, spec
from cm3leon_jax.models import transformer

SIZES = {"num_layers": 2, "width": 32, "num_heads": 4, "mlp_width": 64, "dtype": "float32"}
CONFIG = ModelConfig(vocab_size=96, max_positions=32, remat_policy="none", loss_chunk=8, **SIZES)


def mesh_of(*shape):
  return create_mesh(MeshConfig(*shape), jax.devices()[: math.prod(shape)])


def place(x, *axes):
  """Puts an array on the current mesh by its logical axes, without compiling a program."""
  return jax.device_put(x, jax.NamedSharding(jax.sharding.get_mesh(), spec(*axes)))


def random_params(config, seed=0):
  """Returns random parameters on the current mesh that are not tiny, even residual outputs."""
  types, mesh = types_of(transformer.init_params, config), jax.sharding.get_mesh()
  return jax.device_put(random_arrays(types, seed), shardings(types, mesh))


def types_of(init, *arguments):
  """Returns the types of parameters that `init(*arguments, key)` makes on the current mesh."""
  return _types_of(jax.sharding.get_mesh(), init, *arguments)


@functools.cache
def _types_of(mesh, init, *arguments):
  return jax.eval_shape(functools.partial(init, *arguments), jax.random.key(0))


def with_repeated_heads(params, repeat=np.repeat):
  """Returns parameters of a model whose heads do not share keys, with each key head repeated."""
  blocks = dict(params["blocks"])
  q, kv = jax.device_get((blocks.pop("q"), blocks.pop("kv")))
  kv = repeat(kv, q.shape[-2] // kv.shape[-2], axis=-2)
  blocks["qkv"] = shard(
    np.concatenate([q[:, None], kv], axis=1), "layers", None, "embed", "heads", "head_dim"
  )
  return {**params, "blocks": blocks}


def random_arrays(types, seed=0):
  """Returns random fp32 arrays in the structure of `types`, without compiling a program."""
  rng = np.random.default_rng(seed)

  def make(path, x):
    mean = 1.0 if "scale" in jax.tree_util.keystr(path) else 0.0
    return rng.normal(mean, 0.2, x.shape).astype(np.float32)

  return jax.tree.map_with_path(make, types)


def tree_of(params):
  """Reads all parameters of a `stored.StoredParams` into host memory."""
  return traverse_util.unflatten_dict({name: params.read(name) for name in params.shapes}, sep=".")


@functools.partial(jax.jit, static_argnums=0)
def model_logits(config, params, tokens, positions, segment_ids):
  """Computes logits [B, L, V] from arrays [B, L] on the current mesh."""
  tokens, positions, segment_ids = (
    shard(jnp.asarray(x), "batch", "length") for x in (tokens, positions, segment_ids)
  )
  model = transformer.bind(config, params)
  return transformer.logits(model(tokens, positions, segment_ids), model.output_table())

"""Initializes a decoder whose embeddings of image codes begin near the codebook."""

# C image codes, d code width, D width, V vocabulary.

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key
import numpy as np

from cm3leon_jax.config.model import ModelConfig
from cm3leon_jax.models.transformer import init_params


def whitened(codebook: Float[np.ndarray, "C d"]) -> Float[np.ndarray, "C d"]:
  """Centers a codebook, and makes its columns uncorrelated with variance 1."""
  centered = codebook - codebook.mean(0)
  left, values, _ = np.linalg.svd(centered, full_matrices=False)
  # Sets directions without variance to zero. Otherwise their rounding errors would be amplified.
  return left * math.sqrt(len(codebook)) * (values > 1e-6 * values[0])


def params_from_codebook(
  config: ModelConfig, text_size: int, codebook: Float[np.ndarray, "C d"], key: Key[Array, ""]
) -> dict:
  """Initializes parameters on the current mesh, with embeddings of image codes from the codebook.

  With s = `config.codebook_start`, the embedding of a code is sqrt(1 - s) times a random vector
  plus sqrt(s) times a random projection of its codebook vector. The variance does not depend on s.
  The input table and the output table use the same projection. `text_size` is the id of the first
  image code.
  """
  share, codes = config.codebook_start, whitened(np.asarray(codebook, np.float32))
  projection = jax.random.normal(jax.random.fold_in(key, 1), (codes.shape[1], config.width))
  rows = jnp.asarray(codes) @ projection / math.sqrt(codes.shape[1])
  rows = jnp.pad(rows, ((text_size, 0), (0, 0)))
  is_code = jnp.arange(config.vocab_size)[:, None] >= text_size

  def start(table: Float[Array, "V D"], std: float) -> Float[Array, "V D"]:
    layout = jax.typeof(table).sharding.spec
    near = jax.sharding.reshard(math.sqrt(share) * std * rows, layout)
    return jnp.where(is_code, math.sqrt(1 - share), 1) * table + near

  params = init_params(config, key)
  stds = {"embed": config.embed_std, "head": config.init_std}
  return params | {name: start(params[name], std) for name, std in stds.items() if name in params}

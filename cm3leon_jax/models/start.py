"""Parameters that training starts from, where the image tokenizer says which codes look alike."""

# C codes, d width of a code, V vocabulary, D width.

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key
import numpy as np

from cm3leon_jax.models import transformer
from cm3leon_jax.models.config import ModelConfig


def whitened(codebook: Float[np.ndarray, "C d"]) -> Float[np.ndarray, "C d"]:
  """Centers a codebook and makes its columns uncorrelated, of variance 1."""
  centered = codebook - codebook.mean(0)
  left, values, _ = np.linalg.svd(centered, full_matrices=False)
  # Directions in which all codes are equal stay 0 instead of noise.
  return left * math.sqrt(len(codebook)) * (values > 1e-6 * values[0])


def params_from_codebook(
  config: ModelConfig,
  text_size: int,
  codebook: Float[np.ndarray, "C d"],
  key: Key[Array, ""],
) -> dict:
  """Initializes parameters on the current mesh, those of image codes partly from a codebook.

  A code's row is sqrt(1 - s) x random + sqrt(s) x its code through a random projection, with
  s = `config.codebook_start`, of the same variance as before. The projection is the same for the
  input and the output table.

  Args:
    config: of the model.
    text_size: first id of an image code; the last ids are the codes.
    codebook: of the image tokenizer.
    key: as for `transformer.init_params`.
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

  params = transformer.init_params(config, key)
  stds = {"embed": config.embed_std, "head": config.init_std}
  return params | {name: start(params[name], std) for name, std in stds.items() if name in params}

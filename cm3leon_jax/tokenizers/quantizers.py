"""Defines the quantizers of the image tokenizer, which convert encodings to indices of codes.

All quantizers have three methods. `prepare` maps encodings to the space of the codes. `nearest`
finds the index of the nearest code. `__call__` looks up the vectors of codes by index.
"""

# N encodings, E code width, K codes, L levels of a channel.

from typing import TypeAlias

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Int32
import numpy as np

from cm3leon_jax.config.tokenizers import Quantizer, check_levels, levels_of

Vectors: TypeAlias = Float[Array | np.ndarray, "*B E"]


def l2_normalize(x: Vectors) -> Float[Array, "*B E"]:
  """Scales vectors along the last axis to norm 1."""
  return x * jax.lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) + 1e-12)


def straight_through(z: Vectors, q: Vectors) -> Float[Array, "*B E"]:
  """Returns q, but the gradient goes to z (straight-through estimator)."""
  return z + jax.lax.stop_gradient(q - z)


class Codebook(nnx.Module):
  """K learned codes of norm 1 (ViT-VQGAN, Yu et al. 2022, arXiv 2110.04627).

  The code nearest to an encoding has the largest inner product with it.
  """

  def __init__(self, num_codes: int, code_dim: int, rngs: nnx.Rngs):
    self.table = nnx.Param(jax.random.normal(rngs.params(), (num_codes, code_dim), jnp.float32))

  def vectors(self) -> Float32[Array, "K E"]:
    """Returns all codes, [K, E]."""
    return l2_normalize(self.table[...])

  def prepare(self, encodings: Vectors) -> Float[Array, "*B E"]:
    """Scales encodings [..., E] to norm 1."""
    return l2_normalize(encodings)

  def nearest(self, z: Vectors) -> Int32[Array, "*B"]:
    """Finds the nearest code of vectors of norm 1: [..., E] -> int32 [...]."""
    products = jnp.matmul(z, self.vectors().T, precision=jax.lax.Precision.HIGHEST)
    return jnp.argmax(products, -1).astype(jnp.int32)

  def __call__(self, indices: Int[Array | np.ndarray, "*B"]) -> Float32[Array, "*B E"]:
    """Looks up codes: int32 [...] -> [..., E] of norm 1."""
    return self.vectors()[indices]


class FSQ(nnx.Module):
  """Finite scalar quantization (Mentzer et al. 2023, arXiv 2309.15505), without parameters.

  Channel i is squashed into (-L_i / 2, L_i / 2) and rounded to one of L_i whole numbers. Every
  combination of these numbers is a code. As the index of the code grows, the first channel changes
  fastest.
  """

  def __init__(self, num_codes: int, code_dim: int):
    check_levels(num_codes, code_dim)
    self.levels = levels_of(num_codes)

  def prepare(self, encodings: Vectors) -> Float[Array, "*B E"]:
    """Squashes encodings [..., E]. The codes of channel i are multiples of 1 / (L_i // 2)."""
    levels = self._levels(encodings.ndim)
    half = (levels - 1) * (1 + 1e-3) / 2  # Slightly enlarged, to reach the outermost levels.
    offset = np.where(levels % 2, 0.0, 0.5)  # If L_i is even, one more level is below 0 than above.
    shift = np.float32(np.arctanh(offset / half))
    squashed = jnp.tanh(encodings + shift) * np.float32(half) - np.float32(offset)
    return squashed / np.float32(levels // 2)

  def nearest(self, z: Vectors) -> Int32[Array, "*B"]:
    """Rounds squashed encodings to codes: [..., E] -> int32 [...]."""
    levels = self._levels(z.ndim)
    digits = jnp.round(z * np.float32(levels // 2)).astype(jnp.int32) + levels // 2
    return jnp.sum(digits * self._strides(z.ndim), -1).astype(jnp.int32)

  def __call__(self, indices: Int[Array | np.ndarray, "*B"]) -> Vectors:
    """Looks up codes: int32 [...] -> [..., E] in [-1, 1]."""
    levels = self._levels(indices.ndim + 1)
    digits = indices[..., None] // self._strides(indices.ndim + 1) % levels
    return (digits - levels // 2) / np.float32(levels // 2)

  def _levels(self, ndim: int) -> np.ndarray:
    return np.array(self.levels, np.int32).reshape((1,) * (ndim - 1) + (-1,))

  def _strides(self, ndim: int) -> np.ndarray:
    strides = np.cumprod([1, *self.levels[:-1]], dtype=np.int32)
    return strides.reshape((1,) * (ndim - 1) + (-1,))


def make(kind: Quantizer, num_codes: int, code_dim: int, rngs: nnx.Rngs) -> Codebook | FSQ:
  """Makes the quantizer of a config.

  Raises:
    ValueError: see `check_levels`.
  """
  if kind == "fsq":
    return FSQ(num_codes, code_dim)
  return Codebook(num_codes, code_dim, rngs)


def loss(
  kind: Quantizer, codebook_weight: float, commitment_weight: float, z: Vectors, q: Vectors
) -> Float32[Array, ""] | float:
  """Computes the weighted sum of codebook loss and commitment loss.

  Both losses are the squared distance between encodings `z` and their codes `q` (van den Oord et
  al. 2017, section 3.2). The gradient of the codebook loss moves only codes, and the gradient of
  the commitment loss moves only encodings. The sum is 0 for `fsq`, whose codes are fixed.
  """
  stop = jax.lax.stop_gradient
  if kind == "fsq":
    return 0.0
  return codebook_weight * _squared(q - stop(z)) + commitment_weight * _squared(z - stop(q))


def _squared(x: Vectors) -> Float[Array, ""]:
  return jnp.mean(jnp.sum(x * x, -1))

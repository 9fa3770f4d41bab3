"""Quantizers of the image tokenizer: encodings become indices of codes, and indices vectors.

All have the same four methods: `prepare` maps encodings to the space of the codes, `nearest` finds
the index of the nearest code, `__call__` returns the vectors of indices, and `pass_through` returns
what the decoder receives in training, with a gradient for the encoder. All but `FSQ` have codes of
norm 1 (ViT-VQGAN, Yu et al. 2022, arXiv 2110.04627).
"""

# N encodings, E code width, K codes, L levels of a channel.

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Int32
import numpy as np

from cm3leon_jax.tokenizers.config import Quantizer, check_levels, levels_of

CODEBOOK_DECAY = 0.99  # Of `ema` (van den Oord et al. 2017, appendix A.1).
RESTARTING = ("", "ema", "rotation")  # Quantizers whose codes can be put at an encoding.


def l2_normalize(x: Float[Array | np.ndarray, "*B E"]) -> Float[Array, "*B E"]:
  """Scales vectors along the last axis to norm 1."""
  return x * jax.lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) + 1e-12)


def straight_through(
  z: Float[Array | np.ndarray, "*B E"], q: Float[Array | np.ndarray, "*B E"]
) -> Float[Array, "*B E"]:
  """Returns the value of q with the gradient of z."""
  return z + jax.lax.stop_gradient(q - z)


def rotate(
  z: Float[Array | np.ndarray, "*B E"], q: Float[Array | np.ndarray, "*B E"]
) -> Float[Array, "*B E"]:
  """Returns the value of q as a rotated and scaled z (Fifty et al. 2024, arXiv 2410.06424).

  The rotation R in the plane of z and q, and the scale s = |q| / |z|, are constants of the
  gradient: that of z is s R^T times that of the result, so its angle to the code is kept.

  Args:
    z: encodings, [..., E]; not opposite to q.
    q: their codes, [..., E].
  """
  stop = jax.lax.stop_gradient
  unit_z, unit_q = stop(l2_normalize(z)), stop(l2_normalize(q))
  middle = l2_normalize(unit_z + unit_q)
  scale = stop(
    jnp.linalg.norm(q, axis=-1, keepdims=True) / jnp.linalg.norm(z, axis=-1, keepdims=True)
  )

  def along(direction: Float[Array | np.ndarray, "*B E"]) -> Float[Array, "*B 1"]:
    return jnp.sum(direction * z, -1, keepdims=True)

  return scale * (z - 2 * along(middle) * middle + 2 * along(unit_z) * unit_q)


class Codebook(nnx.Module):
  """K codes of norm 1; the nearest code is that of the largest inner product."""

  def __init__(self, num_codes: int, code_dim: int, rotates: bool, rngs: nnx.Rngs):
    self.table = nnx.Param(jax.random.normal(rngs.params(), (num_codes, code_dim), jnp.float32))
    self.rotates = rotates

  def vectors(self) -> Float32[Array, "K E"]:
    """Returns all codes, [K, E]."""
    return l2_normalize(self.table[...])

  def prepare(self, encodings: Float[Array | np.ndarray, "*B E"]) -> Float[Array, "*B E"]:
    """Scales encodings [..., E] to norm 1."""
    return l2_normalize(encodings)

  def nearest(self, z: Float[Array | np.ndarray, "*B E"]) -> Int32[Array, "*B"]:
    """Finds the nearest code of vectors of norm 1: [..., E] -> int32 [...]."""
    products = jnp.matmul(z, self.vectors().T, precision=jax.lax.Precision.HIGHEST)
    return jnp.argmax(products, -1).astype(jnp.int32)

  def __call__(self, indices: Int[Array | np.ndarray, "*B"]) -> Float32[Array, "*B E"]:
    """Looks up codes: int32 [...] -> [..., E] of norm 1."""
    return self.vectors()[indices]

  def pass_through(
    self, z: Float[Array | np.ndarray, "*B E"], q: Float[Array | np.ndarray, "*B E"]
  ) -> Float[Array, "*B E"]:
    """Returns the value of q with a gradient for z, straight through or rotated."""
    return rotate(z, q) if self.rotates else straight_through(z, q)


class SimVQ(Codebook):
  """A frozen codebook times one learned matrix (Zhu et al. 2024, arXiv 2411.02038).

  Each use of any code moves the matrix and thus all codes, so none stays unused. The product is
  scaled to norm 1, as all codes here are; the paper's is not.
  """

  def __init__(self, num_codes: int, code_dim: int, rngs: nnx.Rngs):
    super().__init__(num_codes, code_dim, False, rngs)
    self.projection = nnx.Param(jnp.eye(code_dim))

  def vectors(self) -> Float32[Array, "K E"]:
    frozen = jax.lax.stop_gradient(self.table[...])
    product = jnp.matmul(frozen, self.projection[...], precision=jax.lax.Precision.HIGHEST)
    return l2_normalize(product)


class FSQ(nnx.Module):
  """Finite scalar quantization (Mentzer et al. 2023, arXiv 2309.15505): it has no parameters.

  Channel i is squashed into (-L_i / 2, L_i / 2) and rounded to one of L_i whole numbers; all
  combinations are codes, and the first channel's level changes fastest with the index.
  """

  def __init__(self, num_codes: int, code_dim: int):
    check_levels(num_codes, code_dim)
    self.levels = levels_of(num_codes)

  def prepare(self, encodings: Float[Array | np.ndarray, "*B E"]) -> Float[Array, "*B E"]:
    """Squashes encodings [..., E]; channel i is in steps of 1 / (L_i // 2)."""
    levels = self._levels(encodings.ndim)
    half = (levels - 1) * (1 + 1e-3) / 2  # A bit more, so that the outermost levels are reached.
    offset = np.where(levels % 2, 0.0, 0.5)  # An even number of levels has one more below 0.
    shift = np.float32(np.arctanh(offset / half))
    squashed = jnp.tanh(encodings + shift) * np.float32(half) - np.float32(offset)
    return squashed / np.float32(levels // 2)

  def nearest(self, z: Float[Array | np.ndarray, "*B E"]) -> Int32[Array, "*B"]:
    """Rounds squashed encodings to codes: [..., E] -> int32 [...]."""
    levels = self._levels(z.ndim)
    digits = jnp.round(z * np.float32(levels // 2)).astype(jnp.int32) + levels // 2
    return jnp.sum(digits * self._strides(z.ndim), -1).astype(jnp.int32)

  def __call__(self, indices: Int[Array | np.ndarray, "*B"]) -> Float[Array | np.ndarray, "*B E"]:
    """Looks up codes: int32 [...] -> [..., E] in [-1, 1]."""
    levels = self._levels(indices.ndim + 1)
    digits = indices[..., None] // self._strides(indices.ndim + 1) % levels
    return (digits - levels // 2) / np.float32(levels // 2)

  def pass_through(
    self, z: Float[Array | np.ndarray, "*B E"], q: Float[Array | np.ndarray, "*B E"]
  ) -> Float[Array, "*B E"]:
    """Returns the value of q with the gradient of z."""
    return straight_through(z, q)

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
  if kind == "simvq":
    return SimVQ(num_codes, code_dim, rngs)
  return Codebook(num_codes, code_dim, kind == "rotation", rngs)


def loss(
  kind: Quantizer,
  codebook_weight: float,
  commitment_weight: float,
  z: Float[Array | np.ndarray, "*B E"],
  q: Float[Array | np.ndarray, "*B E"],
) -> Float32[Array, ""] | float:
  """Computes the codebook and the commitment loss (van den Oord et al. 2017, section 3.2).

  Codes of `ema` follow their encodings without a loss, those of `fsq` are given.

  Args:
    kind: of the quantizer.
    codebook_weight: of the squared distance, whose gradient moves codes.
    commitment_weight: of the squared distance, whose gradient moves encodings.
    z: encodings, [..., E].
    q: their codes, [..., E].
  """
  stop = jax.lax.stop_gradient
  if kind == "fsq":
    return 0.0
  commitment = commitment_weight * _squared(z - stop(q))
  return commitment if kind == "ema" else codebook_weight * _squared(q - stop(z)) + commitment


def _squared(x: Float[Array | np.ndarray, "*B E"]) -> Float[Array, ""]:
  return jnp.mean(jnp.sum(x * x, -1))


def init_averages(table: Float[Array | np.ndarray, "K E"]) -> dict:
  """Returns the first averages of `ema`, as if one encoding equal to each code had been seen.

  Args:
    table: of the codes, [K, E]; not yet scaled to norm 1.

  Returns:
    counts, fp32 [K], and sums, fp32 [K, E].
  """
  return {"counts": jnp.ones(len(table), jnp.float32), "sums": l2_normalize(table)}


def update_averages(
  averages: dict,
  z: Float[Array | np.ndarray, "*B E"],
  indices: Int[Array | np.ndarray, "*B"],
  decay: float = CODEBOOK_DECAY,
) -> dict:
  """Moves the averages of `ema` (van den Oord et al. 2017, appendix A.1).

    counts = decay * counts + (1 - decay) * number of encodings with the code
    sums = decay * sums + (1 - decay) * sum of these encodings

  Args:
    averages: counts [K] and sums [K, E], fp32.
    z: encodings, [..., E].
    indices: of their codes, int32 [...].
    decay: of one step.
  """
  z, indices = z.reshape(-1, z.shape[-1]), indices.ravel()
  num_codes = len(averages["counts"])
  new = {
    "counts": jnp.bincount(indices, length=num_codes).astype(jnp.float32),
    "sums": jax.ops.segment_sum(z, indices, num_codes),
  }
  return jax.tree.map(lambda old, x: decay * old + (1 - decay) * x, averages, new)


def averaged_table(averages: dict, table: Float[Array | np.ndarray, "K E"]) -> Float[Array, "K E"]:
  """Returns sums / counts, [K, E]; a code whose count has decayed to about 0 keeps its row."""
  counts = averages["counts"][:, None]
  return jnp.where(counts > 1e-20, averages["sums"] / jnp.maximum(counts, 1e-20), table)

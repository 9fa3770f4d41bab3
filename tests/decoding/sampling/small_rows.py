"""Makes settings of rows, and exact scores of contrastive decoding (CD-K), for several tests."""

import functools

import jax
import numpy as np

from cm3leon_jax.decoding.sampling.rows import RowSettings, StreamLogits, sample


@functools.partial(jax.jit, static_argnames="candidates")
def sample_top_p(guided, keys, rows, candidates):
  return sample(StreamLogits(guided, guided, guided), keys, rows, candidates)


def rows_of(*settings) -> RowSettings:
  """Joins the settings of rows, made by `top` or `cdk`, into one `RowSettings`."""
  dtypes = (np.float32, np.int32, np.float32, bool, np.float32, np.float32)
  columns = [np.array(column, dtype) for column, dtype in zip(zip(*settings), dtypes)]
  return RowSettings(*columns)


def top(temperature=1.0, top_k=0, top_p=1.0):
  return (temperature, top_k, top_p, False, 0.5, 0.5)


def cdk(temperature=0.8, alpha=0.5, amateur_temperature=0.5):
  return (temperature, 1, 0.1, True, alpha, amateur_temperature)  # CD-K ignores top_k and top_p.


def exact_scores(expert, amateur, k, alpha):
  p, q = (
    np.exp(x.astype(np.float64)) / np.exp(x.astype(np.float64)).sum() for x in (expert, amateur)
  )
  legal = p > 0
  ranked = sorted(p, reverse=True)
  with np.errstate(divide="ignore", invalid="ignore"):
    return np.where(
      legal & (p >= alpha * ranked[min(k, len(p)) - 1]), np.log(p) - np.log(q), -np.inf
    )

"""Makes settings of rows, and exact scores of contrastive decoding (CD-K), for several tests."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from cm3leon_jax.decoding.sampling.contrastive import ContrastiveRows
from cm3leon_jax.decoding.sampling.method import StreamLogits
from cm3leon_jax.decoding.sampling.methods import OTHERS
from cm3leon_jax.decoding.sampling.rows import RowSettings, sample
from cm3leon_jax.decoding.sampling.top_p import TopPRows


@functools.partial(jax.jit, static_argnames="candidates")
def sample_top_p(guided, keys, rows, candidates):
  return sample(StreamLogits(guided, guided, guided), keys, rows, candidates)


def contrastive_uses(flags) -> dict:
  """Returns the methods of rows: CD-K where `flags` is set, otherwise top-p."""
  return {other.name: jnp.zeros_like(flags) for other in OTHERS} | {"contrastive": flags}


def rows_of(*settings) -> RowSettings:
  """Joins the settings of rows, made by `top` or `cdk`, into one `RowSettings`."""
  dtypes = (np.float32, np.int32, np.float32, bool, np.float32, np.float32)
  columns = [np.array(column, dtype) for column, dtype in zip(zip(*settings), dtypes)]
  temperature, top_k, top_p, contrastive, alpha, amateur_temperature = columns
  others = {"contrastive": (contrastive, ContrastiveRows(alpha, amateur_temperature))}
  return RowSettings(temperature, TopPRows(top_k, top_p), others)


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

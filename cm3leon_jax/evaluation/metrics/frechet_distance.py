"""Computes the Frechet distance between two sets of features."""

# n rows of a set, d features per row, r rows of a factor.

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from scipy import linalg

from cm3leon_jax.evaluation.metrics.feature_sets import two_sets

BLOCK = 4096  # Number of rows that are converted to float64 at a time.


def frechet_distance(first: npt.ArrayLike, second: npt.ArrayLike) -> float:
  """Returns the Frechet distance between the normal distributions of two sets of features.

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))
    first = [[-1], [0], [1]], second = [[-1], [1], [3]], means 0 and 1, variances 1 and 4
    result = 1 + 1 + 4 - 2 * 2 = 2.0

  This is the squared distance of Heusel et al., "GANs Trained by a Two Time-Scale Update Rule
  Converge to a Local Nash Equilibrium" (2017). With features of Inception, it is the FID. The trace
  of (C1 C2)^(1/2) is computed as the sum of the singular values of F1 F2^T, where F^T F = C.
  Singular values are real and nonnegative for covariances of any rank. A matrix square root of
  C1 C2, which is not symmetric, can become complex or fail.

  Rounding can make the distance of nearly equal sets negative, by about 1e-15 of the traces. The
  result is then 0. The distance is biased upward, more so with fewer images. Compare only distances
  between equally large sets. Each set has at least 2 rows.
  """
  means, factors = zip(*map(_mean_and_factor, two_sets(first, second)))
  shift = means[0] - means[1]
  traces = sum(np.sum(factor**2) for factor in factors)
  cross = linalg.svdvals(factors[0] @ factors[1].T).sum()
  return max(0.0, float(shift @ shift + traces - 2 * cross))


def _mean_and_factor(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns the mean of rows [n, d] and a factor F [r, d] of their covariance, F^T F.

  The covariance is the unbiased estimate. If n < d, the rows of F are the centered rows, scaled.
  Otherwise the rows of F are eigenvectors of the covariance, scaled. If columns are linearly
  dependent, some eigenvalues are rounding errors. Such eigenvalues are dropped, because their
  square roots (about 1e-8) would add up.
  """
  total, width = len(rows), rows.shape[1]
  mean = sum((np.ones(len(x)) @ x for x in _blocks(rows)), np.zeros(width)) / total
  centered = ((x - mean) * np.sqrt(1 / (total - 1)) for x in _blocks(rows))
  if total < width:
    return mean, np.concatenate(list(centered))
  covariance = sum((x.T @ x for x in centered), np.zeros((width, width)))
  values, vectors = np.linalg.eigh(covariance)  # Eigenvalues are in ascending order.
  kept = values > width * np.finfo(np.float64).eps * values[-1]
  return mean, (vectors[:, kept] * np.sqrt(values[kept])).T


def _blocks(rows: np.ndarray) -> Iterator[np.ndarray]:
  for start in range(0, len(rows), BLOCK):
    yield np.asarray(rows[start : start + BLOCK], np.float64)

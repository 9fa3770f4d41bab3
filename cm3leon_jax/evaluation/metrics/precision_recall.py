"""Computes improved precision and recall of generated images from their features.

Distances are computed in blocks, so memory does not depend on the number of rows.
"""

# n generated rows, m real rows, d features per row.

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from cm3leon_jax.errors import UserError
from cm3leon_jax.evaluation.metrics.feature_sets import two_sets

BLOCK = 1024  # Number of rows per block.


def precision_recall(
  generated: npt.ArrayLike, real: npt.ArrayLike, neighbors: int = 3
) -> dict[str, float]:
  """Computes precision and recall: shares of rows that are close to a row of the other set.

    neighbors = 1, generated = [[0], [1], [9]] with the balls -1 to 1, 0 to 2 and 1 to 17
    real = [[2], [4.5], [5]] with the balls -0.5 to 4.5, 4 to 5 and 4.5 to 5.5
    result = {"precision": 0.67, "recall": 1.0}: 9 is in no ball of real rows

  The ball around a row reaches to its k-th nearest neighbor in the same set, not counting the row
  itself. The ball includes its boundary. Precision is the share of generated rows that are in the
  ball of any real row, which measures quality. Recall is the share of real rows that are in the
  ball of any generated row, which measures variety. Both values depend on the numbers of rows, so
  compare only values of equally large sets. `neighbors` is k. Source: Kynkaanniemi et al.,
  "Improved Precision and Recall Metric for Assessing Generative Models" (2019), with k = 3.

  Raises:
    UserError: a set has k or fewer rows, so that every row would be inside.
  """
  generated, real = two_sets(generated, real)
  if (fewest := min(len(generated), len(real))) <= neighbors:
    raise UserError(f"precision and recall need more than {neighbors} images, but got {fewest}.")
  # Rows are centered, because distances between rows far from 0 would lose precision.
  center = real.mean(axis=0, dtype=np.float64)
  return {
    "precision": _share_inside(generated, real, _radii(real, neighbors, center), center),
    "recall": _share_inside(real, generated, _radii(generated, neighbors, center), center),
  }


def _radii(rows: np.ndarray, neighbors: int, center: np.ndarray) -> np.ndarray:
  """Returns, for each row, the squared distance to its k-th nearest neighbor."""
  radii = []
  for i, x in enumerate(_blocks(rows, center)):
    nearest = np.full((len(x), neighbors), np.inf)
    for j, y in enumerate(_blocks(rows, center)):
      distances = _squared_distances(x, y)
      if i == j:
        np.fill_diagonal(distances, np.inf)
      nearest = np.concatenate([nearest, distances], axis=1)
      nearest = np.partition(nearest, neighbors - 1, axis=1)[:, :neighbors]
    radii.append(nearest.max(axis=1))
  return np.concatenate(radii)


def _share_inside(
  rows: np.ndarray, others: np.ndarray, radii: np.ndarray, center: np.ndarray
) -> float:
  """Returns the share of `rows` that are in at least one ball of `others`."""
  count = 0
  for x in _blocks(rows, center):
    inside = np.zeros(len(x), bool)
    for j, y in enumerate(_blocks(others, center)):
      own = radii[j * BLOCK : (j + 1) * BLOCK]
      inside |= (_squared_distances(x, y) <= own).any(axis=1)
    count += int(inside.sum())
  return count / len(rows)


def _squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """Computes |x - y|^2 [n, m]: exactly 0 for equal rows, so balls of radius 0 contain them."""
  lengths = np.einsum("nd,nd->n", x, x)[:, None] + np.einsum("md,md->m", y, y)
  distances = lengths - 2 * (x @ y.T)
  distances[distances <= x.shape[1] * np.finfo(np.float64).eps * lengths] = 0.0
  return distances


def _blocks(rows: np.ndarray, center: np.ndarray) -> Iterator[np.ndarray]:
  for start in range(0, len(rows), BLOCK):
    yield rows[start : start + BLOCK] - center

"""Compares two sets of image features: Frechet distance, KID, CMMD, precision and recall.

Pairs of rows are compared in blocks, so memory does not grow with the square of their number.
"""

# n rows of the first set, m rows of the second set, d features per row, r rows of a factor.

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
from scipy import linalg

from cm3leon_jax.errors import UserError

BLOCK = 1024  # Number of rows per block.
SIGMA = 10.0  # Width of the Gaussian kernel of CMMD.
SCALE = 1000.0  # CMMD is MMD^2 times this factor.

# A function of this type computes the kernel of each pair of rows: [n, d], [m, d] -> [n, m].
Kernel = Callable[[np.ndarray, np.ndarray], np.ndarray]


def two_sets(first: npt.ArrayLike, second: npt.ArrayLike) -> tuple[np.ndarray, np.ndarray]:
  """Converts features to arrays [n, d]. Raises UserError if a number is not finite."""
  first, second = np.asarray(first), np.asarray(second)
  for rows in (first, second):
    wrong = ~np.isfinite(rows).all(axis=1)
    if wrong.any():
      raise UserError(
        f"row {wrong.argmax()} of the features has a number that is not finite: check its image "
        "and the extractor."
      )
  return first, second


def _blocks(rows: np.ndarray, size: int = 0) -> Iterator[np.ndarray]:
  size = size or BLOCK
  for start in range(0, len(rows), size):
    yield np.asarray(rows[start : start + size], np.float64)


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
  total, width, size = len(rows), rows.shape[1], 4 * BLOCK
  mean = sum((np.ones(len(x)) @ x for x in _blocks(rows, size)), np.zeros(width)) / total
  centered = ((x - mean) * np.sqrt(1 / (total - 1)) for x in _blocks(rows, size))
  if total < width:
    return mean, np.concatenate(list(centered))
  covariance = sum((x.T @ x for x in centered), np.zeros((width, width)))
  values, vectors = np.linalg.eigh(covariance)  # Eigenvalues are in ascending order.
  kept = values > width * np.finfo(np.float64).eps * values[-1]
  return mean, (vectors[:, kept] * np.sqrt(values[kept])).T


def kid(
  first: npt.ArrayLike,
  second: npt.ArrayLike,
  num_subsets: int = 100,
  subset_size: int = 1000,
  seed: int = 0,
) -> dict[str, float | int]:
  """Computes the kernel distance KID: the mean of `polynomial_mmd` over random subsets.

  Source: Binkowski et al., "Demystifying MMD GANs" (2018). KID is unbiased: sets of different sizes
  can be compared, and values slightly below 0 are correct. With `seed` 2020, torch-fidelity 0.4
  draws the same subsets, without replacement. If a set has fewer than `subset_size` rows, subsets
  have as many rows as the smaller set.

  Returns:
    {"mean", "std", "subset_size"}. `std` is the standard deviation over the subsets. It is not the
    standard error of the mean, because subsets share rows.
  """
  sets = two_sets(first, second)
  size = min(subset_size, *map(len, sets))
  rng = np.random.RandomState(seed)  # The legacy generator that torch-fidelity uses.
  distances = []
  for _ in range(num_subsets):
    subsets = [rows[rng.choice(len(rows), size, replace=False)] for rows in sets]
    distances.append(polynomial_mmd(*subsets))
  return {"mean": float(np.mean(distances)), "std": float(np.std(distances)), "subset_size": size}


def polynomial_mmd(first: npt.ArrayLike, second: npt.ArrayLike) -> float:
  """Returns the unbiased MMD^2 of the kernel (x.y / d + 1)^3 (Gretton et al. 2012).

    first = [[0], [1]], second = [[0], [2]]; kernels: 1 in first, 1 in second, 1, 1, 1, 27 between
    result = 1 + 1 - 2 * 30 / 4 = -13.0

  The result is the sum of the mean kernels within each set, minus twice the mean kernel between the
  sets. Pairs of a row with itself are excluded.
  """
  first, second = two_sets(first, second)
  result = -2 * _sum_between(_cubic, first, second) / (len(first) * len(second))
  for rows in (first, second):
    result += _sum_within(_cubic, rows) / (len(rows) * (len(rows) - 1))
  return result


def cmmd(first: npt.ArrayLike, second: npt.ArrayLike) -> float:
  """Returns CMMD: 1,000 times the MMD^2 of a Gaussian kernel (sigma 10) on normalized rows.

    first = [[2, 0]], second = [[0, 5]]; kernels: 1 within each set, exp(-2 / 200) between
    result = 1000 * (2 - 2 * exp(-0.01)) = 19.90

  Jayasumana et al., "Rethinking FID: Towards a Better Evaluation Metric for Image Generation"
  (2024). As in the code of the authors, the estimate is biased, because it includes pairs of a row
  with itself. The bias is proportional to 1 / n, so compare only distances between equally large
  sets. Rounding errors below 0 become 0. The result may be called CMMD only if the features are
  from CLIP ViT-L/14 at 336 pixels.
  """
  sets = two_sets(first, second)
  result = -2 * _sum_between(_gaussian, *sets) / (len(sets[0]) * len(sets[1]))
  for rows in sets:
    result += (_sum_within(_gaussian, rows) + len(rows)) / len(rows) ** 2
  return max(0.0, SCALE * result)


def _cubic(x: np.ndarray, y: np.ndarray) -> np.ndarray:
  base = x @ y.T / x.shape[1] + 1
  return base * base * base  # Several times faster than `base**3`.


def _gaussian(x: np.ndarray, y: np.ndarray) -> np.ndarray:
  x, y = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (x, y))
  return np.exp((x @ y.T - 1) / SIGMA**2)  # Rows have norm 1, so |x - y|^2 = 2 - 2 x.y.


def _sum_between(kernel: Kernel, first: np.ndarray, second: np.ndarray) -> float:
  """Sums the kernel over all pairs of a row of `first` and a row of `second`."""
  return sum(float(kernel(x, y).sum()) for x in _blocks(first) for y in _blocks(second))


def _sum_within(kernel: Kernel, rows: np.ndarray) -> float:
  """Sums the kernel over all ordered pairs of different rows."""
  total = 0.0
  for i, x in enumerate(_blocks(rows)):
    own = kernel(x, x)
    np.fill_diagonal(own, 0.0)
    total += float(own.sum()) + 2 * _sum_between(kernel, x, rows[(i + 1) * BLOCK :])
  return total


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
  sets = two_sets(generated, real)
  if (fewest := min(map(len, sets))) <= neighbors:
    raise UserError(f"precision and recall need more than {neighbors} images, but got {fewest}.")
  # Rows are centered, because distances between rows far from 0 would lose precision.
  center = sets[1].mean(axis=0, dtype=np.float64)
  made, true = (rows - center for rows in sets)
  return {
    "precision": _share_inside(made, true, _radii(true, neighbors)),
    "recall": _share_inside(true, made, _radii(made, neighbors)),
  }


def _radii(rows: np.ndarray, neighbors: int) -> np.ndarray:
  """Returns, for each row, the squared distance to its k-th nearest neighbor."""
  radii = []
  for i, x in enumerate(_blocks(rows)):
    nearest = np.full((len(x), neighbors), np.inf)
    for j, y in enumerate(_blocks(rows)):
      distances = _squared_distances(x, y)
      if i == j:
        np.fill_diagonal(distances, np.inf)
      nearest = np.concatenate([nearest, distances], axis=1)
      nearest = np.partition(nearest, neighbors - 1, axis=1)[:, :neighbors]
    radii.append(nearest.max(axis=1))
  return np.concatenate(radii)


def _share_inside(rows: np.ndarray, others: np.ndarray, radii: np.ndarray) -> float:
  """Returns the share of `rows` that are in at least one ball of `others`."""
  count = 0
  for x in _blocks(rows):
    inside = np.zeros(len(x), bool)
    for j, y in enumerate(_blocks(others)):
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

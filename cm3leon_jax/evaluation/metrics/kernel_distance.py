"""Computes kernel distances between two sets of features: KID and CMMD.

Both are a maximum mean discrepancy (MMD, Gretton et al., "A Kernel Two-Sample Test", 2012): the sum
of the mean kernels within each set, minus twice the mean kernel between the sets. Kernels are
computed in blocks, so memory does not depend on the number of rows.
"""

# n rows of the first set, m rows of the second set, d features per row.

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from cm3leon_jax.evaluation.metrics.feature_sets import two_sets

SIGMA = 10.0  # Width of the Gaussian kernel of CMMD.
SCALE = 1000.0  # CMMD is MMD^2 times this factor.
BLOCK = 1024  # Number of rows per block.

# A function of this type computes the kernel of each pair of rows: [n, d], [m, d] -> [n, m].
Kernel = Callable[[np.ndarray, np.ndarray], np.ndarray]


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
  draws the same subsets.

  Args:
    first: [n, d] features. The result may be called KID only if the features are from Inception.
    second: [m, d] features.
    num_subsets: number of random subsets of each set. A subset is drawn without replacement.
    subset_size: number of rows of a subset. If a set has fewer rows, subsets have as many rows as
      the smaller set.

  Returns:
    {"mean", "std", "subset_size"}. `subset_size` is the actual number of rows per subset. `std` is
    the standard deviation over the subsets. It is not the standard error of the mean, because
    subsets share rows. If each subset is the whole set, `std` is about 0.
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
  """Returns the unbiased MMD^2 of the kernel (x.y / d + 1)^3.

    first = [[0], [1]], second = [[0], [2]]; kernels: 1 in first, 1 in second, 1, 1, 1, 27 between
    result = 1 + 1 - 2 * 30 / 4 = -13.0

  Pairs of a row with itself are excluded. The means are over n (n - 1) and m (m - 1) pairs within
  the sets, and n m pairs between the sets.
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
  sets. The result is never negative, because rounding errors below 0 become 0. The code of the
  authors computes in float32, so its results have rounding errors of about 1e-4.

  Args:
    first: [n, d] features of any norm. The result may be called CMMD only if the features are from
      CLIP ViT-L/14 at 336 pixels.
    second: [m, d] features.
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


def _blocks(rows: np.ndarray) -> Iterator[np.ndarray]:
  for start in range(0, len(rows), BLOCK):
    yield np.asarray(rows[start : start + BLOCK], np.float64)

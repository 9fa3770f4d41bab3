"""Computes means and covariances of features in one pass, and Frechet distances between two sets.

Features are rows of numbers, one row per image, from any model that embeds images.
"""

# n rows, d numbers in a row, r rank of a covariance.

import zipfile

from etils import epath
import numpy as np
import numpy.typing as npt
from scipy import linalg

from cm3leon_jax.config import UserError
from cm3leon_jax.files.atomic import replacing

MIN_ROWS = 2  # A covariance needs at least two rows.
FIELDS = ("count", "mean", "scatter")


class Moments:
  """Count, mean and covariance of rows that are added in batches.

    moments = Moments(2)
    moments.add([[0, 0], [2, 0]])
    moments.add([[1, 3]])
    count = 3, mean = [1, 1], covariance() = [[1, 0], [0, 3]]

  The squared differences from the current mean are summed, and the sum is corrected when the mean
  changes (Chan, Golub, LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample
  Variances", 1979). Therefore features far from 0 do not lose digits, and the result does not
  depend on the batch sizes. Memory is d x d numbers for any number of rows.

  Attributes:
    count: n.
    mean: [d] float64; zeros before the first row.
    scatter: [d, d] float64, the sum of (row - mean) (row - mean)^T.
  """

  def __init__(self, width: int):
    """Creates moments of zero rows. All rows must have `width` numbers."""
    self.count = 0
    self.mean = np.zeros(width)
    self.scatter = np.zeros((width, width))

  def add(self, rows: npt.ArrayLike, counts: npt.ArrayLike | None = None) -> None:
    """Adds a batch of rows.

    Args:
      rows: [n, d] numbers; n may be 0.
      counts: [n] whole numbers: how often each row counts. None: each row counts once.

    Raises:
      UserError: the rows have another width, or a number is not finite.
    """
    rows = np.asarray(feature_rows(rows), np.float64)
    _check_widths(len(self.mean), rows.shape[1])
    if counts is None:
      counts = np.ones(len(rows))
    else:
      counts = np.asarray(counts, np.float64)
      rows, counts = rows[counts > 0], counts[counts > 0]
    if not len(rows):
      return
    mean = counts @ rows / counts.sum()
    deviations = (rows - mean) * np.sqrt(counts)[:, None]
    self._join(int(counts.sum()), mean, deviations.T @ deviations)

  def merge(self, other: "Moments") -> None:
    """Adds the rows of `other`, for example the rows of another host.

    Raises:
      UserError: the rows of `other` have another width.
    """
    _check_widths(len(self.mean), len(other.mean))
    if other.count:
      self._join(other.count, other.mean, other.scatter)

  def _join(self, count: int, mean: np.ndarray, scatter: np.ndarray) -> None:
    total = self.count + count
    shift = mean - self.mean
    self.scatter += scatter + np.outer(shift, shift) * (self.count * count / total)
    self.mean += shift * (count / total)
    self.count = total

  def covariance(self) -> np.ndarray:
    """Returns the unbiased covariance, [d, d], as `numpy.cov`: scatter / (n - 1).

    Raises:
      UserError: there are fewer than 2 rows.
    """
    if self.count < MIN_ROWS:
      raise UserError(
        f"a covariance needs the features of at least {MIN_ROWS} images, but there are "
        f"{self.count}: give more images."
      )
    return self.scatter / (self.count - 1)

  def save(self, path: epath.PathLike) -> None:
    """Writes atomically an .npz file that `load` reads."""
    with replacing(path) as file:
      np.savez(file, **{name: getattr(self, name) for name in FIELDS})

  @classmethod
  def load(cls, path: epath.PathLike) -> "Moments":
    """Reads a file that `save` wrote.

    If the remaining rows are then added, the result is bitwise equal to a run without interruption.

    Raises:
      UserError: the file is absent, or does not contain moments.
    """
    try:
      with epath.Path(path).open("rb") as file, np.load(file) as arrays:
        count, mean, scatter = (arrays[name] for name in FIELDS)
    except FileNotFoundError as error:
      raise UserError(f"{path} does not exist: compute the moments first.") from error
    except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
      raise UserError(
        f"{path} has no moments ({error}): delete it and compute them again."
      ) from error
    moments = cls(len(mean))
    moments.count, moments.mean, moments.scatter = int(count), mean, scatter
    return moments


def feature_rows(rows: npt.ArrayLike) -> np.ndarray:
  """Converts features to an array [n, d] without changing their dtype.

  Raises:
    UserError: the features are not rows of numbers, or a number is not finite.
  """
  rows = np.asarray(rows)
  if rows.ndim != 2:
    raise UserError(f"features have the shape {rows.shape}; they must be rows of numbers [n, d].")
  wrong = ~np.isfinite(rows).all(axis=1)
  if wrong.any():
    raise UserError(
      f"row {wrong.argmax()} of the features has a number that is not finite: check its image and "
      "the extractor."
    )
  return rows


def two_sets(
  first: npt.ArrayLike, second: npt.ArrayLike, at_least: int
) -> tuple[np.ndarray, np.ndarray]:
  """Converts two sets of features by `feature_rows`, and checks that they can be compared.

  Raises:
    UserError: the sets differ in width, or a set has fewer than `at_least` rows.
  """
  first, second = feature_rows(first), feature_rows(second)
  _check_widths(first.shape[1], second.shape[1])
  fewest = min(len(first), len(second))
  if fewest < at_least:
    raise UserError(
      f"this distance needs at least {at_least} images in each set, but one set has {fewest}: give "
      "more images."
    )
  return first, second


def frechet_distance(first: Moments, second: Moments) -> float:
  """Returns the Frechet distance between the normal distributions of two sets of features.

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))
    d = 1, means 0 and 1, variances 1 and 4: 1 + 1 + 4 - 2 * 2 = 2.0

  This is the squared distance of Heusel et al., "GANs Trained by a Two Time-Scale Update Rule
  Converge to a Local Nash Equilibrium" (2017). With features of Inception, it is the FID. The trace
  of (C1 C2)^(1/2) is computed as the sum of the singular values of F1^T F2, where F F^T = C.
  Singular values are real and nonnegative for covariances of any rank. A matrix square root of
  C1 C2, which is not symmetric, can become complex or fail.

  Rounding can make the distance of nearly equal sets negative, by about 1e-15 of the traces. The
  result is then 0. The distance is biased upward, and the bias grows as the number of images falls.
  Compare only distances of equally many images.

  Raises:
    UserError: a set has fewer than 2 rows, or the sets differ in width.
  """
  _check_widths(len(first.mean), len(second.mean))
  shift = first.mean - second.mean
  covariances = first.covariance(), second.covariance()
  roots = [_factor(covariance) for covariance in covariances]
  cross = linalg.svdvals(roots[0].T @ roots[1]).sum()
  distance = shift @ shift + sum(np.trace(c) for c in covariances) - 2 * cross
  return max(0.0, float(distance))


def _factor(covariance: np.ndarray) -> np.ndarray:
  """Returns F [d, r] with F F^T = covariance.

  If there are fewer than d + 1 rows, or if columns are linearly dependent, some eigenvalues consist
  of rounding errors. They are dropped, because their square roots (about 1e-8) would add up.
  """
  values, vectors = np.linalg.eigh(covariance)  # Eigenvalues are in ascending order.
  kept = values > len(values) * np.finfo(np.float64).eps * values[-1]
  return vectors[:, kept] * np.sqrt(values[kept])


def _check_widths(first: int, second: int) -> None:
  if first != second:
    raise UserError(
      f"some features have {first} numbers per row, others {second}: compare features of one "
      "extractor."
    )

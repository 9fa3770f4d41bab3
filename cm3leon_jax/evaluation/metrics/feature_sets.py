"""Checks two sets of image features before a metric compares them."""

# n rows of a set, d numbers in a row.

import numpy as np
import numpy.typing as npt

from cm3leon_jax.config import UserError


def two_sets(
  first: npt.ArrayLike, second: npt.ArrayLike, at_least: int
) -> tuple[np.ndarray, np.ndarray]:
  """Converts two sets of features to arrays [n, d] without changing their dtypes.

  Features are rows of numbers, one row per image, from any model that embeds images.

  Raises:
    UserError: a set is not rows of finite numbers, the sets differ in width, or a set has fewer
      than `at_least` rows.
  """
  first, second = _feature_rows(first), _feature_rows(second)
  if first.shape[1] != second.shape[1]:
    raise UserError(
      f"some features have {first.shape[1]} numbers per row, others {second.shape[1]}: compare "
      "features of one extractor."
    )
  fewest = min(len(first), len(second))
  if fewest < at_least:
    raise UserError(
      f"this distance needs at least {at_least} images in each set, but one set has {fewest}: give "
      "more images."
    )
  return first, second


def _feature_rows(rows: npt.ArrayLike) -> np.ndarray:
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

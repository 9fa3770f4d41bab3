"""Checks two sets of image features before a metric compares them."""

# n rows of a set, d numbers in a row.

import numpy as np
import numpy.typing as npt

from cm3leon_jax.errors import UserError


def two_sets(first: npt.ArrayLike, second: npt.ArrayLike) -> tuple[np.ndarray, np.ndarray]:
  """Converts two sets of features to arrays [n, d] without changing their dtypes.

  Raises:
    UserError: a number is not finite.
  """
  first, second = np.asarray(first), np.asarray(second)
  for rows in (first, second):
    wrong = ~np.isfinite(rows).all(axis=1)
    if wrong.any():
      raise UserError(
        f"row {wrong.argmax()} of the features has a number that is not finite: check its image "
        "and the extractor."
      )
  return first, second

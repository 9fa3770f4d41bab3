"""Compares two sets of image features: CMMD, and the FID, KID and others of torch-fidelity."""

# n rows of the first set, m rows of the second set, d features per row.

from typing import Any

import numpy as np
import numpy.typing as npt

from cm3leon_jax import extras
from cm3leon_jax.errors import UserError

BLOCK = 1024  # Number of rows of a set that are compared at a time.
SIGMA = 10.0  # Width of the Gaussian kernel of CMMD.
SCALE = 1000.0  # CMMD is MMD^2 times this factor.
NEIGHBORS = 3


def fidelity() -> Any:
  """Returns the package torch_fidelity. Raises UserError if it is not installed."""
  try:
    import torch_fidelity.metric_fid
    import torch_fidelity.metric_kid
    import torch_fidelity.metric_prc
  except ImportError as error:
    raise UserError(f"features need a package ({error}): {extras.install('eval')}.") from error
  return torch_fidelity


def _checked(*sets: npt.ArrayLike) -> list[np.ndarray]:
  """Converts features to fp64. Raises UserError if a number is not finite."""
  result = [np.asarray(rows, np.float64) for rows in sets]
  for rows in result:
    wrong = ~np.isfinite(rows).all(axis=1)
    if wrong.any():
      raise UserError(
        f"row {wrong.argmax()} of the features has a number that is not finite: check its image "
        "and the extractor."
      )
  return result


def _tensors(*sets: npt.ArrayLike) -> list[Any]:
  import torch

  return [torch.from_numpy(rows) for rows in _checked(*sets)]


def frechet_distance(first: npt.ArrayLike, second: npt.ArrayLike) -> float:
  """Returns the squared Frechet distance of Heusel et al. (2017); of Inception's features, the FID.

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), of means m and covariances C of [n, d] and [m, d]

  The distance is biased upward, more so with fewer images. Compare only distances between equally
  large sets. Each set has at least 2 rows. Rounding errors below 0 become 0.
  """
  metric = fidelity().metric_fid
  statistics = map(metric.fid_features_to_statistics, _tensors(first, second))
  result = metric.fid_statistics_to_metric(*statistics, verbose=False)
  return max(0.0, result[metric.KEY_METRIC_FID])


def kid(first: npt.ArrayLike, second: npt.ArrayLike, seed: int = 0) -> dict[str, float | int]:
  """Computes the kernel distance KID over 100 random subsets of at most 1,000 rows.

  Source: Binkowski et al., "Demystifying MMD GANs" (2018). KID is unbiased: sets of different sizes
  can be compared, and values slightly below 0 are correct.

  Returns:
    {"mean", "std", "subset_size"}. `std` is the standard deviation over the subsets. It is not the
    standard error of the mean, because subsets share rows.
  """
  metric, sets = fidelity().metric_kid, _tensors(first, second)
  size = min(1000, *map(len, sets))
  result = metric.kid_features_to_metric(
    *sets, kid_subsets=100, kid_subset_size=size, rng_seed=seed, verbose=False
  )
  names = {"mean": metric.KEY_METRIC_KID_MEAN, "std": metric.KEY_METRIC_KID_STD}
  return {**{ours: result[theirs] for ours, theirs in names.items()}, "subset_size": size}


def precision_recall(generated: npt.ArrayLike, real: npt.ArrayLike) -> dict[str, float]:
  """Computes improved precision and recall (Kynkäänniemi et al. 2019), from 0 to 1.

  The ball around a row reaches to its third nearest neighbor in the same set. Precision is the
  share of generated rows that are in the ball of any real row, which measures quality. Recall is
  the share of real rows that are in the ball of any generated row, which measures variety. Both
  depend on the numbers of rows, so compare only equally large sets.

  Raises:
    UserError: a set does not have more than 3 rows.
  """
  sets = _tensors(generated, real)
  if (least := min(map(len, sets))) <= NEIGHBORS:
    raise UserError(
      f"precision and recall need more than {NEIGHBORS} images in each set, but a set has {least}: "
      "use more examples."
    )
  result = fidelity().metric_prc.prc_features_to_metric(
    *sets, prc_neighborhood=NEIGHBORS, prc_batch_size=BLOCK, save_cpu_ram=True, verbose=False
  )
  return {name: result[name] for name in ("precision", "recall")}


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
  x, y = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in _checked(first, second))

  def mean_kernel(x: np.ndarray, y: np.ndarray) -> float:
    blocks = (x[start : start + BLOCK] for start in range(0, len(x), BLOCK))
    # Rows have norm 1, so |x - y|^2 = 2 - 2 x.y.
    return sum(np.exp((rows @ y.T - 1) / SIGMA**2).sum() for rows in blocks) / len(x) / len(y)

  return max(0.0, SCALE * float(mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y)))

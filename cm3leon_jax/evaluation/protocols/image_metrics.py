"""Computes metrics of images: distances between sets, and means over examples."""

import numpy as np

from cm3leon_jax.evaluation.metrics import frechet_distance as frechet
from cm3leon_jax.evaluation.metrics import kernel_distance
from cm3leon_jax.evaluation.metrics.precision_recall import precision_recall as shares_inside
from cm3leon_jax.evaluation.protocols.column import ColumnSamples, mean, present


def _features(column: ColumnSamples) -> list[np.ndarray]:
  """Returns [features of the samples, features of the real images]."""
  return [present(present(images).features) for images in (column.images, column.reference)]


def frechet_distance(column: ColumnSamples) -> dict:
  """Computes the Frechet distance between the samples and the real images."""
  made, real = _features(column)
  return {"value": frechet.frechet_distance(made, real), "samples": len(made)}


def kernel(column: ColumnSamples) -> dict:
  """Computes the kernel distance KID. `std` is the standard deviation over random subsets."""
  made, real = _features(column)
  found = kernel_distance.kid(made, real, seed=column.seed)
  return {"value": found["mean"], **found, "samples": len(made)}


def precision(column: ColumnSamples) -> dict:
  """Computes improved precision as `value`, and also `recall`."""
  made, real = _features(column)
  found = shares_inside(made, real)
  return {"value": found["precision"], "recall": found["recall"], "samples": len(made)}


def cmmd(column: ColumnSamples) -> dict:
  """Computes CMMD. Its paper uses features of CLIP ViT-L/14 at 336 pixels."""
  made, real = _features(column)
  return {"value": kernel_distance.cmmd(made, real), "samples": len(made)}


def clip_score(column: ColumnSamples) -> dict:
  """Averages the cosine similarity between each image and its caption."""
  return mean(
    np.sum(present(present(column.images).embeddings) * present(column.captions), axis=1).tolist(),
    column,
  )


def likelihood(column: ColumnSamples) -> dict:
  """Averages log p(caption | image) - log p(caption) in nats, computed by the evaluated model."""
  return mean(present(column.likelihoods), column)


def vqa_score(column: ColumnSamples) -> dict:
  """Averages the probability of "yes" when the decoder is asked if an image shows its caption.

  This is VQAScore (Lin et al. 2024) with the decoder of the run. The decoder must have been tuned
  on yes-no questions.
  """
  return mean(present(column.agreements), column)


def copy_rate(column: ColumnSamples) -> dict:
  """Averages the percentage of positions at which a sample copies the code of its best neighbor."""
  copied = [line["copied"] for line in column.lines]
  return mean([None if share is None else 100 * share for share in copied], column)


def judged(column: ColumnSamples) -> dict:
  """Computes the percentage of images that show exactly what their captions say."""
  return mean([100.0 * right for right in present(column.verdicts)], column)

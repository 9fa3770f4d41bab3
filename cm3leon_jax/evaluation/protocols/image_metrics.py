"""Metrics of images: distances of sets, and means over examples."""

import numpy as np

from cm3leon_jax.evaluation.metrics import code_histograms, kernel_distance
from cm3leon_jax.evaluation.metrics.frechet_interval import frechet_interval
from cm3leon_jax.evaluation.metrics.precision_recall import precision_recall as shares_inside
from cm3leon_jax.evaluation.protocols.column import ColumnSamples, mean, present


def frechet_distance(column: ColumnSamples) -> dict:
  """Computes the Frechet distance of the samples' features from those of the real images."""
  made, real = present(column.images), present(column.reference)
  features = present(made.features), present(real.features)
  found = frechet_interval(features[0], made.groups, features[1], real.groups, seed=column.seed)
  return {"value": found.pop("distance"), **found, "samples": len(made.groups)}


def kernel(column: ColumnSamples) -> dict:
  """Computes the kernel distance (KID); `std` is that of its subsets, no error of the mean."""
  made, real = present(column.images), present(column.reference)
  found = kernel_distance.kid(present(made.features), present(real.features), seed=column.seed)
  return {"value": found["mean"], **found, "samples": len(made.groups)}


def precision(column: ColumnSamples) -> dict:
  """Computes improved precision, and `recall` beside it."""
  made, real = present(column.images), present(column.reference)
  found = shares_inside(present(made.features), present(real.features))
  return {"value": found["precision"], "recall": found["recall"], "samples": len(made.groups)}


def cmmd(column: ColumnSamples) -> dict:
  """Computes CMMD; the paper's numbers are those of CLIP ViT-L/14 at 336 pixels."""
  made, real = present(column.images), present(column.reference)
  return {
    "value": kernel_distance.cmmd(present(made.features), present(real.features)),
    "samples": len(made.groups),
  }


def code_distance(column: ColumnSamples) -> dict:
  """Computes the Jensen-Shannon divergence in bits of the image codes' frequencies."""
  sets = [present(present(images).codes) for images in (column.images, column.reference)]
  size = 1 + max(int(codes.max()) for codes in sets)
  made, real = (code_histograms.count_codes([codes], size) for codes in sets)
  return {
    "value": code_histograms.jensen_shannon_bits(made, real),
    "total_variation": code_histograms.total_variation(made, real),
    "samples": len(column.groups),
  }


def clip_score(column: ColumnSamples) -> dict:
  """Averages the cosines of images and captions."""
  return mean(
    np.sum(present(present(column.images).embeddings) * present(column.captions), axis=1).tolist(),
    column,
  )


def likelihood(column: ColumnSamples) -> dict:
  """Averages how much likelier an image makes its caption, by the model itself, in nats."""
  return mean(present(column.likelihoods).tolist(), column)


def vqa_score(column: ColumnSamples) -> dict:
  """Averages how probable "yes" is if the model is asked whether an image shows its caption.

  VQAScore (Lin et al. 2024) with the run's own decoder, which must have been tuned on yes and no.
  """
  return mean(present(column.agreements).tolist(), column)


def copy_rate(column: ColumnSamples) -> dict:
  """Averages the percentage of codes that the best neighbor has at the same places."""
  copied = [line["copied"] for line in column.lines]
  return mean([None if share is None else 100 * share for share in copied], column)


def judged(column: ColumnSamples) -> dict:
  """Computes the percentage of images that show exactly what their captions say."""
  return mean((100 * present(column.verdicts)).astype(float).tolist(), column)

"""Computes BLEU and CIDEr of captions, and the numbers per image that a bootstrap needs.

Both metrics equal the metrics of pycocoevalcap, which publications use. A caption is a list of
tokens from `ptb.tokenize`.
"""

# n images, N = 4 orders of n-grams.

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from cm3leon_jax.config import UserError

Caption = Sequence[str]
Grams = list[Counter]

N = 4
# pycocoevalcap adds these numbers to the counts of matches and n-grams. Therefore BLEU-N is about
# 1e-4, not 0, if no n-gram of N words matches in the whole set.
TINY, SMALL = 1e-15, 1e-9
SIGMA = 6.0


def bleu_counts(
  candidates: Sequence[Caption], references: Sequence[Sequence[Caption]]
) -> np.ndarray:
  """Counts n-grams and lengths, from which BLEU is computed (Papineni et al. 2002, section 2).

    candidates = [["the", "cat", "the"]], references = [[["the", "cat", "sat"], ["a", "cat"]]]
    result = [[2, 1, 0, 0, 3, 2, 1, 0, 3]]

  Returns [n, 2N + 1] int64. Columns 0 to N - 1 count matching n-grams of 1 to N words. An n-gram
  matches at most as often as it occurs in one of the references. Columns N to 2N - 1 count all
  n-grams of the caption. The last column is the length of the reference whose length is closest to
  the caption, or the shorter length if two references are equally close.

  Raises:
    UserError: there are no images, captions and images differ in number, or an image has no
      references.
  """
  _check(candidates, references)
  rows = []
  for caption, others in zip(candidates, references):
    grams = _grams(caption)
    most: Grams = [Counter() for _ in range(N)]
    for other in others:
      for order, counter in enumerate(_grams(other)):
        most[order] |= counter
    matches = [(own & allowed).total() for own, allowed in zip(grams, most)]
    totals = [own.total() for own in grams]
    lengths = (len(other) for other in others)
    closest = min(lengths, key=lambda length: (abs(length - len(caption)), length))
    rows.append([*matches, *totals, closest])
  return np.array(rows, np.int64)


def bleu(sums: npt.ArrayLike) -> np.ndarray:
  """Computes BLEU-1 to BLEU-4 from sums of counts.

    bleu([2, 1, 0, 0, 3, 2, 1, 0, 3]) = [0.667, 0.577, 0.000, 0.000]

  With `counts` of `bleu_counts`, `bleu(counts.sum(0))` is the BLEU of the set and `bleu(counts)` is
  the BLEU of each image. With indices [R, n], `bleu(counts[indices].sum(1))` is the BLEU of R
  resamples. `sums` is [..., 2N + 1]. Returns [..., N] fp64: the geometric mean of the precisions of
  1-grams to N-grams, times a penalty for candidates that are shorter than their references.
  """
  sums = np.asarray(sums, np.float64)
  matches, totals, reference_length = sums[..., :N], sums[..., N : 2 * N], sums[..., 2 * N]
  logs = np.log((matches + TINY) / (totals + SMALL))
  precision = np.exp(np.cumsum(logs, axis=-1) / np.arange(1, N + 1))
  ratio = (totals[..., 0] + TINY) / (reference_length + SMALL)
  penalty = np.exp(np.minimum(0, 1 - 1 / ratio))
  return precision * penalty[..., None]


def cider(candidates: Sequence[Caption], references: Sequence[Sequence[Caption]]) -> np.ndarray:
  """Computes the CIDEr-D of each image (Vedantam et al. 2015, section 7).

    candidates = [["a", "cat"], ["a", "dog"]], references = [[["a", "cat"]], [["the", "bird"]]]
    result = [5.0, 0.0]

  The first caption equals its reference. Its score is 5, not 10, because it has no 3-grams and no
  4-grams, and missing orders count as 0. The weight of an n-gram is log(n / m), where m is the
  number of images with this n-gram in a reference. Therefore all scores are 0 if there is only one
  image. In a bootstrap, resamples keep the weights of the whole set. Returns [n] fp64, from 0 to
  10, whose mean is the CIDEr-D of the set.

  Raises:
    UserError: there are no images, captions and images differ in number, or an image has no
      references.
  """
  _check(candidates, references)
  grams = [[_grams(other) for other in others] for others in references]
  frequencies: Counter = Counter()
  for others in grams:
    frequencies.update({gram for other in others for counter in other for gram in counter})
  idf: dict[tuple[str, ...], float]
  idf = {gram: np.log(len(grams) / count) for gram, count in frequencies.items()}
  unseen: float = np.log(len(grams))

  def weigh(counters: Grams) -> list[dict]:
    return [{gram: k * idf.get(gram, unseen) for gram, k in own.items()} for own in counters]

  values = []
  for caption, others in zip(candidates, grams):
    own = _grams(caption)
    vector = weigh(own)
    similarities = [
      _similarity(vector, weigh(other)) * _length_penalty(own, other) for other in others
    ]
    values.append(10 * np.mean(similarities))
  return np.array(values, np.float64)


def _similarity(candidate: list[dict], reference: list[dict]) -> float:
  """Averages the cosine over n-gram orders. Clips weights of the candidate to the reference's."""
  cosines = []
  for own, other in zip(candidate, reference):
    product = sum(
      min(weight, other[gram]) * other[gram] for gram, weight in own.items() if gram in other
    )
    norms = [sum(weight**2 for weight in vector.values()) for vector in (own, other)]
    cosines.append(product / np.sqrt(norms[0] * norms[1]) if all(norms) else 0.0)
  return float(np.mean(cosines))


def _length_penalty(candidate: Grams, reference: Grams) -> float:
  """Computes a Gaussian of the difference in length between candidate and reference."""
  difference = candidate[0].total() - reference[0].total()
  return float(np.exp(-(difference**2) / (2 * SIGMA**2)))


def _grams(caption: Caption) -> Grams:
  """Counts the n-grams of 1 to N words."""
  return [
    Counter(tuple(caption[i : i + n]) for i in range(len(caption) - n + 1)) for n in range(1, N + 1)
  ]


def _check(candidates: Sequence[Caption], references: Sequence[Sequence[Caption]]) -> None:
  """Raises a UserError unless each of one or more images has a caption and references."""
  if len(candidates) != len(references):
    raise UserError(
      f"There are {len(candidates)} captions for {len(references)} images: give one for each."
    )
  if not candidates:
    raise UserError("There are no captions to score: give at least one.")
  for i, others in enumerate(references):
    if not others:
      raise UserError(f"Image {i} has no references: give at least one, or leave the image out.")

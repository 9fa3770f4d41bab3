"""Counts generated images that are one color, equal to others, or copies of retrieved documents."""

# I codes per image.

from collections.abc import Sequence

from jaxtyping import Int
import numpy as np

from cm3leon_jax.generation.sample import Sample
from cm3leon_jax.vocab import VocabLayout

# An image is one color if all its codes are equal, or if its pixels deviate from their mean by less
# than this (root mean square, of 255). A black square of 6 x 6 pixels on 48 x 48 white ones: 32.
LEAST_DEVIATION = 6.0
# An image is a copy of a document if it has this share of all its codes, and of those that differ
# from the most frequent one, the background.
COPIED = 0.9


def is_one_color(image: np.ndarray, codes: Int[np.ndarray, " I"]) -> bool:
  """Returns whether an image, uint8 [H, W, 3], has only one color."""
  deviation = np.sqrt(np.var(image, (0, 1), np.float64).mean())
  return bool(deviation < LEAST_DEVIATION or (codes == codes[0]).all())


def is_copy(codes: Int[np.ndarray, " I"], document: Int[np.ndarray, " I"]) -> bool:
  """Returns whether an image is a copy of a document's image.

  codes = document = [7, 7, 7, 5]: True
  codes = [7] * 19 + [3], document = [7] * 19 + [5]: False, only the background is equal
  """
  same, drawn = codes == document, document != np.bincount(document).argmax()
  return bool(same.mean() >= COPIED and (not drawn.any() or same[drawn].mean() >= COPIED))


def count(samples: Sequence[Sample], vocab: VocabLayout) -> dict[str, int]:
  """Counts the samples of one image, and those that are doubtful. Returns {} without such samples.

  `equal` counts other images that have the codes of a sample for another prompt; `retrieved`,
  images with a retrieved document; and `copies`, copies of such a document.
  """
  drawn = [sample for sample in samples if len(sample.codes) == 1]
  prompts: dict[tuple, set[str]] = {}
  counts = dict.fromkeys(("images", "one_color", "equal", "retrieved", "copies"), 0)
  for sample in drawn:
    prompts.setdefault(tuple(sample.codes[0]), set()).add(sample.task.prompt)
  for sample in drawn:
    codes, documents = sample.codes[0], [d.segments[1].tokens for d in sample.neighbors]
    counts["images"] += 1
    one_color = is_one_color(np.asarray(sample.image), codes)
    counts["one_color"] += one_color
    counts["equal"] += len(prompts[tuple(codes)]) > 1 and not one_color
    counts["retrieved"] += bool(documents)
    counts["copies"] += any(is_copy(codes, vocab.image_codes(ids)) for ids in documents)
  return counts if drawn else {}


def describe(counts: dict[str, int]) -> str:
  """Formats a result of `count` that is not {}: "warning: of 20 samples, 15 are one color, ..."."""
  doubtful = {name: counts[name] for name in ("one_color", "equal", "copies")}
  one_color, equal, copies = (f"{n} {'is' if n == 1 else 'are'}" for n in doubtful.values())
  text = f"of {counts['images']} samples, {one_color} one color, {equal} equal to one of another "
  text += "prompt"
  if counts["retrieved"]:
    text += f"; of {counts['retrieved']} with a retrieved document, {copies} a copy of it"
  return f"{'warning: ' if any(doubtful.values()) else ''}{text}."

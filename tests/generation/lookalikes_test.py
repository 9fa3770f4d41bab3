import numpy as np
import pytest

from cm3leon_jax.data.documents.store import Document, Segment
from cm3leon_jax.generation import lookalikes
from cm3leon_jax.generation.image_tasks import TextToImage
from cm3leon_jax.generation.sample import Sample
from tests.data.stores import VOCAB

DRAWN = np.array([5] * 17 + [6, 7, 8], np.int32)


def sample(prompt, codes, image, *neighbors):
  documents = tuple(
    Document("k", (Segment(False, np.zeros(1, np.int32)), Segment(True, ids + VOCAB.text_size)),
             "", "", "") for ids in neighbors
  )  # fmt: skip
  none = np.zeros(1)
  return Sample(TextToImage(prompt), 0, 0, (image,), (codes,), (), none, none, False, documents)


def test_blank_equal_and_copied_images_are_counted_and_said():
  rng, other = np.random.default_rng(0), np.arange(20, dtype=np.int32) % 9
  picture = rng.integers(0, 256, (8, 8, 3), np.uint8)
  white = np.full((8, 8, 3), 255, np.uint8) - rng.integers(0, 4, (8, 8, 3), np.uint8)
  samples = [
    sample("a", DRAWN, picture, other),
    sample("b", DRAWN, picture, other, DRAWN),  # Equal to the first, and a copy.
    sample("c", other, white),
    sample("c", other, picture),  # Equal to a sample for the same prompt only.
    sample("d", np.full(20, 3), picture),  # Equal codes: one color, whatever the pixels.
  ]
  counts = lookalikes.count(samples, VOCAB)
  assert counts == {"images": 5, "one_color": 2, "equal": 2, "retrieved": 2, "copies": 1}
  text = lookalikes.describe(counts)
  for part in ("warning: of 5", "2 are one color", "2 are equal", "of 2 with", "1 is a copy"):
    assert part in text
  fine = lookalikes.count(samples[3:4], VOCAB)
  assert lookalikes.describe(fine).startswith("of 1 samples, 0 are one color, 0 are equal")
  assert lookalikes.count([], VOCAB) == {}


@pytest.mark.parametrize(
  ("changed", "expected"), [([], True), ([0, 1], True), ([0, 1, 2], False), ([19], False)]
)
def test_a_copy_has_nearly_all_codes_of_a_document_and_of_its_drawing(changed, expected):
  codes = DRAWN.copy()
  codes[changed] = 1
  assert lookalikes.is_copy(codes, DRAWN) == expected

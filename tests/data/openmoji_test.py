import numpy as np
import pytest

from cm3leon_jax.data import openmoji


@pytest.mark.parametrize(
  ("code", "caption", "concept"),
  [
    ("1F600", "grinning face", "grinning face"),
    ("1F469-1F3FE-200D-1F373", "woman cook medium dark skin tone", "person cook"),
    (
      "1FAF1-1F3FB-200D-1FAF2-1F3FE",
      "handshake light skin tone medium dark skin tone",
      "handshake",
    ),
    ("1F1F3-1F1F1", "flag of Netherlands", "flag of Netherlands"),
    ("1F3F4-E0067-E0062-E0065-E006E-E0067-E007F", "flag of England", "flag of England"),
    ("1FAD9-200D-1F7E5", "jar, red square", "jar, red square"),
    ("2654", "white chess king", "white chess king"),
    ("E001", "", ""),
    ("1F3F4-E0065-E0073-E0069-E0062-E007F", "", ""),
  ],
)
def test_captions_and_concepts(code, caption, concept):
  assert openmoji.caption(code) == caption
  assert openmoji.concept(caption) == concept


def test_drawings_are_many_named_in_clean_words_and_unique():
  drawings, nameless = openmoji.drawings()
  assert len(drawings) > 4_000
  assert nameless > 0
  assert len({d.code for d in drawings}) == len(drawings)
  assert not any(set("_-:\u200d\ufe0f") & set(d.caption) for d in drawings)
  assert all(d.caption and d.concept for d in drawings)


def test_render_draws_on_white():
  drawings, _ = openmoji.drawings()
  path = next(d.path for d in drawings if d.caption == "red heart")
  image = openmoji.render(path, 32)
  assert image.shape == (32, 32, 3)
  assert image.dtype == np.uint8
  assert image[0, 0].tolist() == [255, 255, 255]
  red, green, blue = image[16, 16].tolist()
  assert red > 200
  assert max(green, blue) < 120

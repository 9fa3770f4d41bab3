import collections
import re

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from examples.openmoji import drawings as openmoji
from tests.data.checks.duplicates_test import photo, prints


@pytest.mark.parametrize(
  ("code", "caption", "concept"),
  [
    ("1F600", "grinning face", "grinning face"),
    ("1F469-1F3FE-200D-1F373", "woman cook medium dark skin tone", "cook"),
    ("1F9D1-200D-1F373", "cook", "cook"),
    ("1F9D9-200D-2640-FE0F", "woman mage", "mage"),
    ("1F9D9", "mage", "mage"),
    ("1F46A", "family", "family"),
    ("1F468-200D-1F469-200D-1F466", "family man woman boy", "family"),
    ("1F469-200D-1F9B0", "woman red hair", "person"),
    ("1F471-200D-2642-FE0F", "man blond hair", "person"),
    ("1F475-1F3FF", "old woman dark skin tone", "older person"),
    ("1F46B", "woman and man holding hands", "people holding hands"),
    ("1F934", "prince", "person with crown"),
    ("1F936", "Mrs. Claus", "Claus"),
    ("1F6B6-200D-27A1-FE0F", "person walking facing right", "walking"),
    (
      "1FAF1-1F3FB-200D-1FAF2-1F3FE",
      "handshake light skin tone medium dark skin tone",
      "handshake",
    ),
    ("1F3FC", "medium light skin tone", "skin tone"),
    ("1F499", "blue heart", "heart"),
    ("1FA75", "light blue heart", "heart"),
    ("1F34F", "green apple", "apple"),
    ("1F4E7", "e mail", "e mail"),
    ("1F9E7", "red envelope", "red envelope"),
    ("1F561", "six thirty", "clock face"),
    ("0037-FE0F-20E3", "keycap 7", "keycap"),
    ("1F316", "waning gibbous moon", "moon"),
    ("1F31D", "full moon face", "moon"),
    ("1F1F3-1F1F1", "flag of Netherlands", "flag of Netherlands"),
    ("1F3F4-E0067-E0062-E0065-E006E-E0067-E007F", "flag of England", "flag of England"),
    ("1FAD9-200D-1F7E5", "jar, red square", "jar"),
    ("2B05", "left arrow", "arrow"),
    ("25FD", "white medium small square", "square"),
    ("2654", "white chess king", "chess king"),
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


PEOPLE = ("1F466", "1F467", "1F468", "1F469", "1F9D1", "1F9D2", "1F474", "1F475", "1F9D3")
SIGNS = re.compile(
  r"-(?:1F3F[B-F]|FE0F|200D|2640|2642|27A1|1F9B[0-3])\b"  # Skin, gender, direction, hair.
)


def test_sequences_of_one_form_are_one_concept():
  """Drawings whose codes differ only in skin, gender, age, hair or direction share a concept."""
  concepts = collections.defaultdict(set)
  for drawing in openmoji.drawings()[0]:
    points = ["person" if p in PEOPLE else p for p in SIGNS.sub("", drawing.code).split("-")]
    form = re.sub(r"person(?:-person)+", "person", "-".join(points))
    concepts[form].add(drawing.concept)
  several = {form: found for form, found in concepts.items() if len(found) > 1}
  assert several == {"person": {"child", "family", "older person", "person"}}


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


def test_concepts_of_near_images_are_united():
  images = [photo(0), photo(0) // 2, photo(1), photo(2)]
  names = ["apple", "pear", "cat", "pear"]
  assert openmoji.unite(names, prints(*images)) == ["apple", "apple", "cat", "apple"]
  assert openmoji.unite(names, prints(*map(photo, range(4)))) == names
  assert openmoji.unite([], prints()) == []


@given(st.permutations(range(8)))
def test_what_is_united_does_not_depend_on_the_order(order):
  """Covers a chain of four names in which images of adjacent names are near duplicates."""
  images = [photo(seed) // (1 + half) for seed in range(4) for half in range(2)]
  names = ["d", "c", "c", "b", "b", "a", "e", "f"]
  expected = ["a", "a", "a", "a", "a", "a", "e", "e"]
  found = openmoji.unite([names[i] for i in order], prints(*(images[i] for i in order)))
  assert found == [expected[i] for i in order]

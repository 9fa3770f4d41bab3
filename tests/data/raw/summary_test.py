from hypothesis import given
from hypothesis import strategies as st
import pytest

from cm3leon_jax.data.raw.summary import merged, of_record, warnings
from cm3leon_jax.data.sources.records import RawInterleaved, RawPair, RawText

PAIR = RawPair("a", "a.png", "a red\n  disc", split="train")
TEXT = RawText("b", "Some text.", split="train")
PAGE = RawInterleaved(
  "c", ({"text": "One."}, {"image": "a.png"}, {"text": "Two."}), split="heldout"
)
COUNTS = {"train_pairs": 279, "heldout_pairs": 21}


def test_of_record():
  assert of_record(PAIR, [(40, 30)]) == {
    "train_caption_characters": 12,
    "train_text_characters": 0,
    "train_crops": 0,
    "fewest_caption_words": 3,
    "most_caption_words": 3,
    "smallest_image": [40, 30],
    "largest_image": [40, 30],
  }
  assert of_record(TEXT, [])["train_text_characters"] == 10
  # Counts only the characters of the training split.
  page = of_record(PAGE, [(8, 8), (30, 40), (4, 9)])
  assert page["train_text_characters"] == page["most_caption_words"] == 0
  assert (page["smallest_image"], page["largest_image"]) == ([4, 9], [30, 40])


def test_merged():
  both = merged([of_record(PAIR, [(40, 30)]), of_record(TEXT, []), of_record(PAGE, [(4, 9)])])
  pair = of_record(PAIR, [(40, 30)])
  assert both == {**pair, "train_text_characters": 10, "smallest_image": [4, 9]}


RECORDS = st.builds(
  lambda caption, split, sizes: of_record(RawPair("k", "i", caption, split=split), sizes),
  st.text("ab \n", max_size=12), st.sampled_from(["train", "heldout"]),
  st.lists(st.tuples(st.integers(1, 50), st.integers(1, 50)), max_size=3),
)  # fmt: skip


@given(st.lists(RECORDS, max_size=6), st.integers(0, 6))
def test_shards_may_be_merged_in_any_way(records, cut):
  parts = [merged(records[:cut]), merged(records[cut:])]
  assert merged(parts) == merged(parts[::-1]) == merged(records)


@pytest.mark.parametrize(
  ("counts", "expected"),
  [
    (COUNTS, []),
    ({"train_texts": 300}, ["0 pairs, so no image has a caption"]),
    ({"train_pairs": 9}, ["0 pairs in the split 'heldout'"]),
    ({"heldout_pairs": 9}, ["0 pairs in the split 'train'"]),
  ],
)
def test_warnings(counts, expected):
  found = list(warnings(counts))
  assert len(found) == len(expected)
  assert all(warning.startswith(start) for warning, start in zip(found, expected))

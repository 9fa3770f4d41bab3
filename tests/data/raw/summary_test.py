import pathlib
import re

from hypothesis import given
from hypothesis import strategies as st
import pytest

from cm3leon_jax.data.raw import summary
from cm3leon_jax.data.raw.summary import merged, of_record, sentence, warnings
from cm3leon_jax.data.sources.records import NOTES, RawInterleaved, RawPair, RawText

PAIR = RawPair("a", "a.png", "a red\n  disc", split="train")
TEXT = RawText("b", "Some text.", split="train")
PAGE = RawInterleaved(
  "c", ({"text": "One."}, {"image": "a.png"}, {"text": "Two."}), split="heldout"
)
COUNTS = {"train_pairs": 279, "heldout_pairs": 21}
SUMMARY = {
  **COUNTS, "fewest_caption_words": 4, "most_caption_words": 31, "smallest_image": [256, 256],
  "largest_image": [256, 256],
  "rejected_unreadable_image": 1, "rejected_missing_caption": 2, "rejected_empty_caption": 2,
}  # fmt: skip


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


def test_sentence():
  assert sentence(SUMMARY, 64) == (
    "279 pairs for training, 21 held out; images of 256 x 256 become 64 x 64; captions of 4 to 31 "
    "words; 5 records set aside: 2 images without a caption, 2 empty captions, 1 image that cannot "
    "be read"
  )
  more = {
    "train_texts": 1, "bank_pairs": 2_000, "smallest_image": [64, 64], "largest_image": [64, 64],
    "conflicting_captions": 3, "most_caption_words": 4, "other_licenses": 7,
  }  # fmt: skip
  kept = {name: value for name, value in SUMMARY.items() if not name.startswith("rejected")}
  assert sentence({**kept, **more}, 64) == (
    "279 pairs for training, 21 held out, 2,000 only for retrieval; 1 text for training, 0 held "
    "out; images of 64 x 64; captions of 4 words; 7 left out because of their licenses; not used: "
    "3 second captions that differ"
  )
  crops = {**COUNTS, **merged([]), "train_pairs": 3_069, "train_crops": 2_790}
  assert sentence(crops, 64) == "279 pairs for training and 2,790 crops of them, 21 held out"
  texts = {"train_texts": 300, **merged([])}
  assert sentence(texts, 64) == (
    "0 pairs for training, 0 held out; 300 texts for training, 0 held out"
  )


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


def test_every_reason_has_words():
  """A reason without a text would make a command fail at its end."""
  folder = pathlib.Path(summary.__file__).parents[1]
  text = "".join(path.read_text() for path in folder.rglob("*.py"))
  text = text.replace('where.split(", line")[0]', "file")
  made = set(re.findall(r'(?:Rejected|RecordError)\([^()]*?"([a-z]+(?:_[a-z]+)+)"', text))
  assert {"missing_caption", "large_file", "malformed_record", *NOTES} <= made
  assert made | {"empty_caption", "empty_text"} == set(summary.REASONS)

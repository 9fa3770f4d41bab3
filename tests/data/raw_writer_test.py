import json

from PIL import Image
import pytest

from cm3leon_jax.data import raw_writer
from cm3leon_jax.data.raw_pairs import load_with_size
from cm3leon_jax.data.raw_writer import RawConfig, write_shard
from cm3leon_jax.data.records import RawPair, RawText, Rejected
from tests.data.sources_test import jpeg


@pytest.fixture
def items(tmp_path):
  Image.new("RGB", (30, 20)).save(tmp_path / "turned.png", exif=turned())
  return [
    RawPair("a", jpeg(1), "one two"),
    RawPair("b", str(tmp_path / "turned.png"), "three"),
    RawPair("c", b"no image", "a caption of a broken image"),
    RawPair("a", jpeg(1), "the key of another"),
    RawText("a", "A text."),
    Rejected("f", "g", "missing_caption", "why"),
    Rejected("f", "h", "conflicting_captions", "that one"),
  ]


def turned():
  exif = Image.Exif()
  exif[0x0112] = 6  # Turned by 90 degrees.
  return exif


def test_a_shard_counts_what_it_holds_and_what_it_leaves_out(items, tmp_path):
  config = RawConfig(source="s", resolution=4, heldout_fraction=0.0)
  summary = write_shard(config, tmp_path / "0", items, load_with_size)
  assert summary["rejected"] == {
    "duplicate_key": 1, "unreadable_image": 1, "missing_caption": 1, "conflicting_captions": 1,
  }  # fmt: skip
  assert summary["more"]["conflicting_captions"] == summary["more"]["rejected_missing_caption"] == 1
  assert (summary["counts"]["train_pairs"], summary["counts"]["train_texts"]) == (2, 1)
  assert summary["statistics"] == {
    "train_caption_characters": 12,
    "train_text_characters": 7,
    "fewest_caption_words": 1,
    "most_caption_words": 2,
    "smallest_image": [8, 8],
    "largest_image": [20, 30],  # Upright.
  }
  lines = (tmp_path / "0" / raw_writer.REJECTED).read_text().splitlines()
  assert {json.loads(line)["reason"] for line in lines} == set(summary["rejected"])
  assert {path.name for path in (tmp_path / "0").iterdir()} == {*raw_writer.FILES, "images"}


def test_a_caption_that_is_not_used_is_not_the_first_wrong_record(items, tmp_path):
  config = RawConfig(source="s", resolution=4)
  summary = write_shard(config, tmp_path / "0", [items[6], items[5]], load_with_size)
  assert summary["first"] == "why"

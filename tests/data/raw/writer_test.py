import json

from etils import epath
import numpy as np
from PIL import Image
import pytest

from cm3leon_jax.config.data import RawConfig
from cm3leon_jax.data.raw import writer
from cm3leon_jax.data.raw.reader import IMAGE_DIGESTS, load_with_size
from cm3leon_jax.data.raw.writer import write_shard
from cm3leon_jax.data.sources.records import RawPair, RawText, Rejected
from tests.data.sources.formats_test import jpeg

FILES = {*writer.FILES, IMAGE_DIGESTS}


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
  ]


def turned():
  exif = Image.Exif()
  exif[0x0112] = 6  # Orientation 6: readers must rotate the image by 90 degrees.
  return exif


def test_a_shard_counts_what_it_holds_and_what_it_leaves_out(items, tmp_path):
  config = RawConfig(source="s", resolution=4, heldout_fraction=0.0)
  summary = write_shard(config, tmp_path / "0", items, load_with_size)
  assert summary["rejected"] == {"duplicate_key": 1, "unreadable_image": 1, "missing_caption": 1}
  assert summary["more"]["rejected_missing_caption"] == 1
  assert (summary["counts"]["train_pairs"], summary["counts"]["train_texts"]) == (2, 1)
  assert summary["statistics"] == {
    "train_caption_characters": 12,
    "train_text_characters": 7,
    "train_crops": 0,
    "fewest_caption_words": 1,
    "most_caption_words": 2,
    "smallest_image": [8, 8],
    "largest_image": [20, 30],  # The written image is already rotated.
  }
  lines = (tmp_path / "0" / writer.REJECTED).read_text().splitlines()
  assert {json.loads(line)["reason"] for line in lines} == set(summary["rejected"])
  assert {path.name for path in (tmp_path / "0").iterdir()} == {*FILES, "images"}


def test_crops_of_training_images_are_added_as_pairs_of_their_concept(tmp_path):
  """Crops come from the original image. A broken image counts as one wrong record, not as four."""
  ramp = np.linspace(0, 255, 100).astype(np.uint8)
  pixels = np.stack(np.broadcast_arrays(ramp[:, None], ramp, np.uint8(0)), -1)  # Row, column, 0.
  Image.fromarray(pixels).save(tmp_path / "ramp.png")
  image = str(tmp_path / "ramp.png")
  items = [
    RawPair("a", image, "one", split="train"),
    RawPair("b", image, "two", split="heldout"),
    RawPair("c", b"no image", "three", split="train"),
  ]
  config = RawConfig(source="s", resolution=40, crops=3)
  summary = write_shard(config, epath.Path(tmp_path / "0"), items, load_with_size)
  assert summary["rejected"] == {"unreadable_image": 1}
  assert (summary["counts"]["train_pairs"], summary["counts"]["heldout_pairs"]) == (4, 1)
  assert summary["statistics"]["train_crops"] == 3
  assert summary["statistics"]["train_caption_characters"] == 4 * len("one")
  lines = [json.loads(line) for line in (tmp_path / "0" / "pairs.jsonl").read_text().splitlines()]
  assert [line["key"] for line in lines] == ["a", "a crop 1", "a crop 2", "a crop 3", "b"]
  assert [line.get("added_crop") for line in lines] == [None, "1", "2", "3", None]
  assert {line["concept"] for line in lines[:4]} == {"a"}
  whole, *crops = [
    np.asarray(Image.open(tmp_path / "0" / line["image"]), int) for line in lines[:4]
  ]
  extent = whole[-1, 0, 0] - whole[0, 0, 0]
  for crop in crops:
    assert crop.shape == (40, 40, 3)
    height, width = crop[-1, 0, 0] - crop[0, 0, 0], crop[0, -1, 1] - crop[0, 0, 1]
    assert 0.85 * extent < height <= extent + 3
    assert abs(height - width) <= 3
  assert len({crop.tobytes() for crop in crops}) == 3
  # Not all crops begin in the top left corner.
  assert max(crop[0, 0, :2].max() for crop in crops) > 8
  again = write_shard(config, epath.Path(tmp_path / "1"), items, load_with_size)
  assert again["digest"] == summary["digest"]

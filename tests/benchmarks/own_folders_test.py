"""Tests the folders of pictures like those of users, and the table of a run on one."""

import itertools

from etils import epath
import numpy as np
from PIL import Image
import pytest

from benchmarks.evidence import own_folders
from examples.pictures.sources import Origin, Photograph
from tests.data.raw_folder import write_raw
from tests.generation.run import save_run


def photograph(width, height):
  """Returns a photograph whose pixels are all different: red is the column, green the row."""
  rows, columns = np.mgrid[:height, :width]
  pixels = np.stack([columns % 256, rows % 256, columns // 256 + 16 * (rows // 256)], -1)
  return Photograph("x/the_cat.png", Image.fromarray(pixels.astype(np.uint8)), Origin("", "", ""))


def test_crops_of_a_photograph_do_not_overlap_and_their_captions_name_their_place(monkeypatch):
  monkeypatch.setattr(Image.Image, "resize", lambda self, size: self)
  found = dict(own_folders.crops([photograph(523, 410)]))
  assert len(found) == 25
  pixels = [{*map(tuple, np.asarray(image).reshape(-1, 3).tolist())} for image in found.values()]
  assert all(len(one) == 82**2 for one in pixels)
  assert not any(a & b for a, b in itertools.combinations(pixels, 2))
  assert np.asarray(found["the cat, top far left"])[0, 0].tolist() == [0, 0, 0]
  corner = np.asarray(found["the cat, bottom far right"])[0, 0].tolist()
  assert corner == [418 - 256, 328 - 256, 1 + 16]


@pytest.mark.slow
def test_the_table_has_a_row_for_samples_and_for_what_they_are_compared_with(tmp_path):
  save_run(epath.Path(tmp_path))
  splits = ["heldout"] * 3 + ["train"] * 4
  pairs = [{"key": f"k{i}", "caption": f"{i} car", "split": x} for i, x in enumerate(splits)]
  images = np.random.default_rng(0).integers(0, 256, (7, 8, 8, 3), np.uint8)
  write_raw(tmp_path / "raw", pairs, images)
  text = own_folders.measure(tmp_path, 2, 0)
  rows = [line.split(" | ") for line in text.splitlines()[2:6]]
  assert [row[0].strip("| ") for row in rows] == [
    "with a document", "without", "the document itself", "true picture through the tokenizer",
  ]  # fmt: skip
  assert [int(row[1]) for row in rows] == [6, 6, 3, 3]
  assert (tmp_path / "own_folders.md").read_text() == text
  assert (tmp_path / "own_folders.png").exists()
  assert "\n3 held-out pictures of 7: " in text

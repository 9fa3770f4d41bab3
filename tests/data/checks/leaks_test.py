import json

import numpy as np
from PIL import Image

from cm3leon_jax.data.checks import leaks
from cm3leon_jax.data.raw import ingest
from cm3leon_jax.data.raw.config import RawConfig
from cm3leon_jax.files.shards import Runner
from tests.data.checks.duplicates_test import COPIES, photo


def prepare(source, out, **fields):
  config = RawConfig(source=str(source), **{"resolution": 64, **fields})
  ingest.prepare(config, ingest.parts_of(config), out, Runner())
  return out


def write_source(folder, images, **interleaved):
  """Writes a captioned folder. `images`: key -> (split, pixels); `interleaved`: split -> pixels."""
  folder.mkdir(parents=True)
  lines = {"pairs": [], "interleaved": []}
  for key, (split, pixels) in images.items():
    Image.fromarray(pixels).save(folder / f"{key}.png")
    pair = {"key": key, "image": f"{key}.png", "caption": key, "split": split}
    lines["pairs"].append(json.dumps(pair) + "\n")
  for split, pixels in interleaved.items():
    Image.fromarray(pixels).save(folder / f"page_{split}.png")
    page = {"key": f"page {split}", "split": split, "segments": [{"image": f"page_{split}.png"}]}
    lines["interleaved"].append(json.dumps(page) + "\n")
  for kind, written in lines.items():
    if written:
      (folder / f"{kind}.jsonl").write_text("".join(written))
  return folder


def photos(split, seeds):
  return {f"{split}{seed}": (split, photo(seed)) for seed in seeds}


def test_planted_copies_are_found_and_nothing_else(tmp_path, monkeypatch):
  # Splits the held-out and training images into several batches.
  monkeypatch.setattr(leaks, "BATCH", 3)
  darker = np.asarray(COPIES["darker"](Image.fromarray(photo(2))))
  source = tmp_path / "in"
  images = photos("train", range(10)) | photos("heldout", range(50, 55))
  write_source(source / "a", {**images, "same": ("heldout", photo(9))})
  write_source(source / "b", {"darker": ("heldout", darker)}, train=photo(52))
  report = leaks.check(prepare(source, tmp_path / "raw"), 2)
  assert (report.heldout, report.train, report.pairs, report.leaked) == (7, 11, 3, 3)
  near = {(pair.heldout, pair.train) for pair in report.nearest if not pair.is_far}
  assert near == {("same", "train9"), ("darker", "train2"), ("heldout52", "page train")}
  first = report.nearest[0]
  assert (first.noise, first.hash_distance) == (-np.inf, 0)
  assert len(report.nearest) > 3
  assert all(pair.is_far for pair in report.nearest[3:])
  assert report.nearest == sorted(report.nearest)


def test_the_limit_of_the_psnr_is_an_argument(tmp_path):
  rng = np.random.default_rng(0)
  noisy = np.clip(photo(3) + rng.normal(0, 3, (64, 64, 3)), 0, 255).astype(np.uint8)
  shifted = np.roll(photo(3), 2, axis=1)
  images = photos("train", [3]) | {"noisy": ("heldout", noisy), "shifted": ("heldout", shifted)}
  raw = prepare(write_source(tmp_path / "in", images), tmp_path / "raw")
  psnr = {pair.heldout: -pair.noise for pair in leaks.check(raw, 2, 0.0).nearest}
  assert psnr["noisy"] > psnr["shifted"] > 0
  assert leaks.check(raw, 2, 0.0).leaked == 2
  assert leaks.check(raw, 2, 100.0).leaked == 1  # Only the perceptual hash finds this leak.


def test_without_heldout_images_nothing_leaks(tmp_path):
  raw = prepare(write_source(tmp_path / "in", photos("train", range(3))), tmp_path / "raw")
  assert leaks.check(raw, 1) == leaks.LeakReport(0, 3, 0, 0, [])


def test_near_duplicates_are_named_those_of_both_splits_first(tmp_path):
  images = photos("train", [1, 2, 3, 4]) | photos("heldout", [3, 9])
  images["copy1"] = images["copy2"] = images["train1"]
  source = write_source(tmp_path / "in", images)
  folder = prepare(source, tmp_path / "raw")
  found = leaks.near_duplicates(folder, 2)
  assert (found.compared, found.near, found.leaked) == (8, 5, 1)
  assert found.pairs[0] == ("heldout3", "train3")
  assert {key for pair in found.pairs for key in pair} >= {"copy1", "train1"}
  assert str(found).startswith(
    "5 of 8 compared images are near duplicates of others: 'heldout3' and 'train3', "
  )
  assert "; 1 held-out image has a near duplicate in training: give both images" in str(found)


def test_near_duplicates_may_be_ignored_if_most_images_are_alike():
  few, most = (leaks.NearDuplicates(8, near, 1, [("a", "b")]) for near in (4, 5))
  assert "ignore it" not in str(few)
  assert str(most).endswith(
    "as drawings on a plain background do: if they show different things, ignore it"
  )


def test_images_of_one_concept_are_no_near_duplicates(tmp_path):
  source = write_source(tmp_path / "in", photos("train", [1, 2]) | photos("heldout", [9]))
  lines = [json.loads(line) for line in (source / "pairs.jsonl").read_text().splitlines()]
  lines += [{**lines[0], "key": "again", "concept": "one"}]
  lines[0]["concept"] = "one"
  (source / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  found = leaks.near_duplicates(prepare(source, tmp_path / "raw"), 2)
  assert (found.compared, found.near, found.leaked, found.pairs) == (4, 0, 0, [])


def test_near_duplicates_are_looked_for_among_a_bounded_number_of_images(tmp_path, monkeypatch):
  monkeypatch.setattr(leaks, "MOST", 8)
  images = photos("train", range(20)) | photos("heldout", range(50, 55))
  folder = prepare(write_source(tmp_path / "in", images), tmp_path / "raw")
  read = []
  load = leaks._load
  monkeypatch.setattr(leaks, "_load", lambda path: read.append(path) or load(path))
  assert leaks.near_duplicates(folder, 2).compared == len(read) == 8


def test_a_folder_of_texts_has_no_near_duplicates(tmp_path):
  (tmp_path / "in").mkdir()
  (tmp_path / "in" / "a.txt").write_text("A text.")
  found = leaks.near_duplicates(prepare(tmp_path / "in", tmp_path / "raw"), 2)
  assert (found.compared, found.near) == (0, 0)

import json

import numpy as np
from PIL import Image

from cm3leon_jax.config.data import RawConfig
from cm3leon_jax.data.checks import leaks
from cm3leon_jax.data.raw import ingest
from cm3leon_jax.stages.shards import Runner
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

import collections
import json
import pathlib

import numpy as np
from PIL import Image
import pytest

from benchmarks import drawing_styles
from cm3leon_jax.data.checks import leaks
from cm3leon_jax.data.raw import ingest, reader
from cm3leon_jax.data.raw.config import RawConfig
from cm3leon_jax.data.sources import builtin, openmoji
from cm3leon_jax.data.sources.records import SPLITS
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
  monkeypatch.setattr(leaks, "BATCH", 3)  # Held-out and training images fill several batches.
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
  assert leaks.check(raw, 2, 100.0).leaked == 1  # Its hash is the same.


def test_without_heldout_images_nothing_leaks(tmp_path):
  raw = prepare(write_source(tmp_path / "in", photos("train", range(3))), tmp_path / "raw")
  assert leaks.check(raw, 1) == leaks.LeakReport(0, 3, 0, 0, [])


@pytest.fixture(scope="module")
def drawings(tmp_path_factory):
  out = tmp_path_factory.mktemp("raw")
  return prepare("openmoji", out, heldout_fraction=0.07, max_texts=40)


@pytest.mark.slow
def test_openmoji_pairs(drawings):
  train, heldout = (reader.read_pairs(drawings, split) for split in SPLITS[:2])
  assert 220 <= len(heldout) <= 300
  assert len(train) > 3_500
  assert sum(len(reader.read_texts(drawings, split)) for split in SPLITS) == 40
  assert {p.license for p in train} == {"CC-BY-SA-4.0"}
  assert all("OpenMoji" in p.attribution and p.group and p.source for p in train)
  cooks = {p.group for p in train + heldout if "cook" in p.caption.split()}
  assert len(cooks) == 1


def test_all_drawings_of_a_concept_are_in_one_split(monkeypatch):
  """Those that look alike, too, are of one concept: `unite_concepts`, which draws them all."""
  monkeypatch.setattr(openmoji, "unite_concepts", lambda named, *_: named)
  pairs, _ = builtin.openmoji_pairs(64, 0.07, 1)
  splits, drawings = collections.defaultdict(set), collections.Counter()
  for pair in pairs:
    splits[pair.concept].add(pair.split)
    drawings[pair.concept] += 1
  assert set(map(len, splits.values())) == {1}
  assert {split for (split,) in splits.values()} == set(SPLITS[:2])
  assert sum(count > 1 for count in drawings.values()) > 100


@pytest.mark.slow
def test_no_heldout_drawing_is_near_a_training_drawing(drawings):
  report = leaks.check(drawings, 2)
  assert (report.pairs, report.leaked) == (0, 0)
  train, heldout = (reader.read_pairs(drawings, split) for split in SPLITS[:2])
  assert (report.heldout, report.train) == (len(heldout), len(train))
  assert len({pair.concept for pair in heldout}) >= 90
  for name in (lambda pair: pair.concept, lambda pair: openmoji.concept(pair.caption)):
    assert not set(map(name, heldout)) & set(map(name, train))


@pytest.mark.slow
def test_every_heldout_drawing_is_further_away_than_the_tokenizer_s_error(drawings):
  """Compares all pixels without the functions that united the concepts."""
  train, heldout = (
    reader.load_images(
      [pair.image for pair in reader.read_pairs(drawings, split)], None, 2
    ).reshape(-1, 64 * 64 * 3)
    / np.float32(255)
    for split in SPLITS[:2]
  )
  products = heldout @ train.T
  squares = (heldout**2).sum(1)[:, None] + (train**2).sum(1) - 2 * products
  assert -10 * np.log10(squares.min() / train.shape[1]) < 22


def styles(load_style, points):
  """Pairs of three styles. `load_style`: style -> number of the code points -> pixels."""
  drawings = {
    (i,): openmoji.Drawing(f"{i:X}", "", f"thing {i}", f"thing {i}") for i in range(points)
  }
  found = {style: {(i,): f"{style} {i}" for i in range(points)} for style in load_style}

  def load(path):
    style, number = path.split()
    return load_style[style](int(number))

  return drawing_styles.make_pairs(found, drawings, load)


def test_styles_that_draw_a_concept_alike_are_held_out_together():
  """Noto differs from OpenMoji in tones only; Fluent differs wholly, and its 7 is like its 8."""
  drawn = {"openmoji": photo, "noto": lambda i: photo(i) - 10}
  drawn["fluent"] = lambda i: photo(1_000 + (8 if i == 7 else i))
  pairs = styles(drawn, 120)
  by_concept = collections.defaultdict(lambda: collections.defaultdict(set))
  for pair in pairs:
    by_concept[pair["concept"]][pair["split"]].add(pair["key"].split("/")[0])
    assert pair["group"].split("/")[0] == ("fluent" if "fluent" in pair["key"] else "noto")
  assert len(by_concept) == 119
  kinds = {tuple(sorted(found["heldout"])) for found in by_concept.values()}
  assert kinds == {(), ("fluent",), ("noto", "openmoji"), ("fluent", "noto", "openmoji")}


@pytest.mark.slow
def test_no_heldout_drawing_of_any_style_is_near_a_training_drawing(tmp_path):
  """Fetches Fluent and Noto from npm."""
  pairs = drawing_styles.make_folder(pathlib.Path(tmp_path / "drawings"), 64)
  report = leaks.check(prepare(tmp_path / "drawings", tmp_path / "raw"), 2)
  assert (report.pairs, report.leaked) == (0, 0)
  assert report.heldout == sum(pair["split"] == "heldout" for pair in pairs) > 250


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

"""Tests the contents of the OpenMoji example's folder, and that its splits share no drawing."""

import collections
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from cm3leon_jax.config.data import RawConfig
from cm3leon_jax.data.checks import leaks
from cm3leon_jax.data.raw import ingest, reader
from cm3leon_jax.data.sources.records import SPLITS
from cm3leon_jax.files.shards import Runner
from examples.openmoji import config as example_config
from examples.openmoji import drawings as openmoji

ROOT = pathlib.Path(__file__).parents[2]


def make(folder, *flags):
  script = ROOT / "examples" / "openmoji" / "make_data.py"
  command = [sys.executable, str(script), str(folder), *flags]
  # When a shell starts a script, sys.path begins with the folder of the script.
  environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
  result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
  return result.stdout


def lines_of(folder, kind):
  return [json.loads(line) for line in (folder / f"{kind}.jsonl").read_text().splitlines()]


def prepare(folder, out):
  config = RawConfig(source=str(folder), resolution=example_config.get_config().raw.resolution)
  return ingest.prepare(config, ingest.parts_of(config), out, Runner())


def test_a_small_folder_is_read_completely(tmp_path):
  shown = make(tmp_path / "data", "--drawings=30", "--texts=5")
  pairs, texts, pages = (
    lines_of(tmp_path / "data", kind) for kind in ("pairs", "texts", "interleaved")
  )
  assert shown.startswith(f"{tmp_path}/data: 30 pairs, 5 texts, {len(pages)} interleaved documents")
  assert (len(pairs), len(texts)) == (30, 5)
  summary = prepare(tmp_path / "data", tmp_path / "raw")
  assert not [name for name in summary if name.startswith("rejected")]
  read = {
    kind: sum(summary[f"{split}_{kind}"] for split in SPLITS[:2])
    for kind in ("pairs", "texts", "interleaved")
  }
  assert read == {"pairs": 30, "texts": 5, "interleaved": len(pages)}
  found = [p for split in SPLITS[:2] for p in reader.read_pairs(tmp_path / "raw", split)]
  by_key = {pair.key: pair for pair in found}
  for line in pairs:
    pair = by_key[line["key"]]
    assert (pair.caption, pair.concept, pair.split) == (
      line["caption"], line["group"], line["split"],
    )  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """Returns a folder with all drawings and few texts, and the raw/ folder prepared from it."""
  base = tmp_path_factory.mktemp("openmoji")
  make(base / "data", "--texts=40")
  prepare(base / "data", base / "raw")
  return base / "data", base / "raw"


@pytest.mark.slow
def test_the_records_of_the_whole_folder(folders):
  data, raw = folders
  train, heldout = (reader.read_pairs(raw, split) for split in SPLITS[:2])
  assert 220 <= len(heldout) <= 300
  assert len(train) > 3_500
  assert sum(len(reader.read_texts(raw, split)) for split in SPLITS) == 40
  assert {p.license for p in train} == {"CC-BY-SA-4.0"}
  assert all("OpenMoji" in p.attribution and p.group and p.source for p in train)
  cooks = {p.group for p in train + heldout if "cook" in p.caption.split()}
  assert len(cooks) == 1
  pages = lines_of(data, "interleaved")
  assert {page["split"] for page in pages} == set(SPLITS[:2])
  assert all(2 <= len([s for s in page["segments"] if "image" in s]) <= 3 for page in pages)
  assert len(pages) > 200


@pytest.mark.slow
def test_all_drawings_of_a_concept_are_in_one_split(folders):
  """Checks the pairs and the interleaved document of each concept."""
  splits, count = collections.defaultdict(set), collections.Counter()
  for line in lines_of(folders[0], "pairs"):
    splits[line["group"]].add(line["split"])
    count[line["group"]] += 1
  for page in lines_of(folders[0], "interleaved"):
    splits[page["group"]].add(page["split"])
  assert set(map(len, splits.values())) == {1}
  assert {split for (split,) in splits.values()} == set(SPLITS[:2])
  assert sum(number > 1 for number in count.values()) > 100


@pytest.mark.slow
def test_no_heldout_drawing_is_near_a_training_drawing(folders):
  _, raw = folders
  report = leaks.check(raw, 2)
  assert (report.pairs, report.leaked) == (0, 0)
  train, heldout = (reader.read_pairs(raw, split) for split in SPLITS[:2])
  assert report.heldout >= len(heldout)  # The report also counts images in interleaved documents.
  assert len({pair.concept for pair in heldout}) >= 90
  for name in (lambda pair: pair.concept, lambda pair: openmoji.concept(pair.caption)):
    assert not set(map(name, heldout)) & set(map(name, train))


@pytest.mark.slow
def test_every_heldout_drawing_is_further_away_than_the_tokenizer_s_error(folders):
  """Compares all pixels, without the functions that merge concepts."""
  train, heldout = (
    reader.load_images(
      [pair.image for pair in reader.read_pairs(folders[1], split)], None, 2
    ).reshape(-1, 64 * 64 * 3)
    / np.float32(255)
    for split in SPLITS[:2]
  )
  products = heldout @ train.T
  squares = (heldout**2).sum(1)[:, None] + (train**2).sum(1) - 2 * products
  assert -10 * np.log10(squares.min() / train.shape[1]) < 22

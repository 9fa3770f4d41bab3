import json

import numpy as np
import pytest

from cm3leon_jax.config.data import RawConfig
from cm3leon_jax.data.raw import ingest, reader
from cm3leon_jax.data.sources import function
from cm3leon_jax.errors import UserError
from cm3leon_jax.stages.shards import Runner
from tests.refusals import refused

OWN = """
import numpy as np

def records(train, side=8):
  for i in range(train + 2):
    split = "train" if i < train else "heldout"
    draw = lambda i=i: np.full((side, side, 3), i, np.uint8)
    yield {"key": f"k{i}", "caption": f"gray {i}", "split": split, "facts": {"n": i},
           "image": draw if i % 2 else draw()}

def wrong(train):
  yield {"key": "a", "caption": "", "image": np.zeros((8, 8, 3), np.uint8)}
  yield {"key": "b", "caption": "gray", "image": np.zeros((8, 8), np.uint8)}

def no_dict(train):
  yield "gray"
"""


@pytest.fixture
def make(tmp_path):
  (tmp_path / "own.py").write_text(OWN)

  def prepare(name="records", folder="raw", resolution=8, **options):
    source = f"{tmp_path}/own.py:{name}"
    config = RawConfig(source=source, options=options, resolution=resolution, max_rejected=1.0)
    return ingest.prepare(config, ingest.parts_of(config), tmp_path / folder, Runner())

  return prepare


def test_records_are_written_in_their_order_in_shards_of_one_split(make, tmp_path, monkeypatch):
  monkeypatch.setattr(function, "PART_RECORDS", 3)
  summary = make(train=7)
  assert (summary["shards"], summary["train_pairs"], summary["heldout_pairs"]) == (4, 7, 2)
  pairs = [
    pair
    for name in reader.shards(tmp_path / "raw")
    for pair in (
      *reader.read_shard(tmp_path / "raw", name, reader.RawPair, "train"),
      *reader.read_shard(tmp_path / "raw", name, reader.RawPair, "heldout"),
    )
  ]
  assert [pair.key for pair in pairs] == [f"k{i}" for i in range(9)]
  assert [pair.facts["n"] for pair in pairs] == [*range(9)]
  images = reader.open_images(tmp_path / "raw", "train", 8)
  assert images[np.arange(7)][:, 0, 0, 0].tolist() == [*range(7)]


def test_images_are_scaled_and_options_make_the_shards_again(make, tmp_path):
  make(train=3)
  make(train=3, side=4)
  first = json.loads((tmp_path / "raw" / "done" / "000000.json").read_text())
  assert first["config"]["part"]["kind"] == "function"
  before = first["config"]["part"]["modified"]
  make(train=4, side=4)
  first = json.loads((tmp_path / "raw" / "done" / "000000.json").read_text())
  assert first["config"]["part"]["modified"] != before
  assert reader.open_images(tmp_path / "raw", "train", 8)[np.arange(4)].shape == (4, 8, 8, 3)


def test_the_reader_returns_the_records_of_any_part(make, tmp_path, monkeypatch):
  monkeypatch.setattr(function, "PART_RECORDS", 2)
  source, options = f"{tmp_path}/own.py:records", {"train": 5}
  found, own = function.parts(source, options), function.Reader(source, options)
  for i in (0, 2, 1, 3):
    expected = [f"k{k}" for k in range(*map(int, found[i].files))]
    assert [record.key for record in own.read(found[i])] == expected


def test_wrong_records_are_rejected_with_their_reason(make, tmp_path):
  with refused(UserError, "own.py:wrong"):
    make("wrong", train=1)
  lines = (tmp_path / "raw" / "rejected.jsonl").read_text().splitlines()
  reasons = [json.loads(line)["reason"] for line in lines]
  assert reasons == ["empty_caption", "unreadable_image"]
  with refused(UserError, "record 0", "no_dict"):
    make("no_dict", train=1)

"""Tests that Ray workers write the same bytes as one process, even after a worker is killed."""

import dataclasses
import json
import os
import pathlib
import signal

import numpy as np
import pytest

from cm3leon_jax.config import UserError
from cm3leon_jax.data.documents import encode
from cm3leon_jax.data.documents.store import DocumentStore
from cm3leon_jax.files.shards import Runner
from cm3leon_jax.retrieval import bank, neighbors
from cm3leon_jax.vocab import VocabLayout
from tests.data.raw_folder import write_raw
from tests.files.shards_test import NAMES, Copy, log, run
from tests.refusals import refused
from tests.retrieval.bank_test import CONFIG, WIDTH, tiny_clip

VOCAB = VocabLayout(num_special=8, text_size=280, image_size=256)
SHARDS = 6


pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # Ray prints warnings.


@pytest.fixture(scope="module")
def ray_address():
  ray = pytest.importorskip("ray")
  ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
  yield "auto"
  ray.shutdown()


class Letters:
  """Fake text tokenizer with one token per character."""

  def encode_batch(self, texts):
    return [np.array([ord(c) + 8 for c in text], np.int32) for text in texts]


class Corners:
  """Fake image tokenizer: codes are corner pixels; the first code `kill_at` kills the process."""

  def __init__(self, mark: str = "", kill_at: int = -1):
    self.mark, self.kill_at = pathlib.Path(mark), kill_at

  def encode(self, images):
    codes = images[:, ::15, ::15, 0].reshape(len(images), 4)
    if self.kill_at in codes[:, 0] and not self.mark.exists():
      self.mark.touch()
      os.kill(os.getpid(), signal.SIGKILL)
    return codes


class Load:
  def __init__(self, *args):
    self.args = args

  def __call__(self):
    return Letters(), Corners(*self.args)


@pytest.fixture
def raw(tmp_path):
  images = np.random.default_rng(0).integers(0, 255, (24, 16, 16, 3), np.uint8)
  images[13, 0, 0] = 255  # Puts the code that kills the worker into the fourth of six shards.
  splits = ["train", "train", "train", "heldout"]
  pairs = [
    {"key": f"k{i}", "caption": chr(97 + i) * 3, "group": f"g{i // 2}", "split": splits[i % 4]}
    for i in range(24)
  ]
  write_raw(tmp_path / "raw", pairs, images, SHARDS)
  return tmp_path / "raw"


def files(folder):
  kinds = (".array_record", ".npz", ".npy")
  found = [
    p
    for p in folder.rglob("*")
    if p.is_file() and (p.suffix in kinds or "c" in p.relative_to(folder).parts)
  ]
  return {
    str(p.relative_to(folder)): p.read_bytes() for p in found if not p.name.endswith(".__lock")
  }


def test_documents_of_a_killed_worker_are_there_once_and_the_same(raw, tmp_path, ray_address):
  def make(name, load, runner):
    job = encode.EncodeJob(str(raw), str(tmp_path / name), load, VOCAB, 16, 8)
    return encode.encode_documents(job, {}, runner)

  local = make("local", Load(), Runner())
  ray = make("ray", Load(str(tmp_path / "mark"), 255), Runner("ray", ray_address, workers=2))
  assert (tmp_path / "mark").exists()  # A worker was killed, as intended.
  assert ray == local
  assert files(tmp_path / "ray") == files(tmp_path / "local")
  assert len(files(tmp_path / "local")) > SHARDS
  stores = [
    DocumentStore(tmp_path / "ray" / f"{split}_pairs", VOCAB) for split in ("train", "heldout")
  ]
  assert sorted(store[i].key for store in stores for i in range(len(store))) == sorted(
    f"k{i}" for i in range(24)
  )


@pytest.mark.parametrize("words", [{}, {"lexical_weight": 0.5, "lexical_width": 16}])
def test_neighbors_by_ray_are_the_same(raw, tmp_path, ray_address, words):
  config = dataclasses.replace(CONFIG, **words)
  for name, runner in (("local", Runner()), ("ray", Runner("ray", ray_address, workers=2))):
    job = bank.EmbedJob(str(raw), str(tmp_path / name), tiny_clip, 0.2, 0, {})
    neighbors.build_neighbors(config, job, WIDTH, {}, runner)
  assert files(tmp_path / "ray") == files(tmp_path / "local")
  assert any("train_pairs/ids" in name for name in files(tmp_path / "local"))


def test_ray_does_every_shard_although_a_worker_is_killed(tmp_path, ray_address):
  job = Copy(str(tmp_path), kill_once="05")
  results = run(tmp_path, job, runner=Runner("ray", ray_address, workers=2))
  assert results == {name: {"length": 2} for name in NAMES}
  assert {path.stem: path.read_text() for path in tmp_path.glob("*.out")} == {
    name: name for name in NAMES
  }
  assert (tmp_path / "killed").exists()
  assert log(tmp_path).count("05") == 2  # Written twice, because its worker was killed.
  assert len(set((tmp_path / "opened").read_text().split())) >= 2
  assert sorted(
    json.loads(p.read_text())["config"]["digest"] for p in (tmp_path / "done").glob("*.json")
  ) == list(range(12))
  before = log(tmp_path)
  run(tmp_path, job)  # All shards are finished.
  assert log(tmp_path) == before


def test_a_user_error_in_a_ray_worker_is_raised_in_one_sentence(tmp_path, ray_address):
  with refused(UserError):
    run(tmp_path, Copy(str(tmp_path), wrong="05"), runner=Runner("ray", ray_address))

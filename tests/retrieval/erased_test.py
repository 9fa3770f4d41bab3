"""Tests that erased documents leave no trace in a run, whose files stay whole at any moment."""

from concurrent import futures
import dataclasses
import functools
import gc
import importlib.util
import json
import os
import pathlib
import shutil
import time

from array_record.python import array_record_module
from etils import epath
import numpy as np
from PIL import Image
import pytest

from cm3leon_jax.data.checks.validate import validate_raw, validate_stores
from cm3leon_jax.data.documents import encode
from cm3leon_jax.data.documents.store import Bank
from cm3leon_jax.data.raw import ingest, reader
from cm3leon_jax.errors import UserError
from cm3leon_jax.files.json_files import read_json, write_json
from cm3leon_jax.retrieval import bank as bank_lib
from cm3leon_jax.retrieval import erased, neighbors, removed
from cm3leon_jax.retrieval.arrays import ArrayStore
from cm3leon_jax.retrieval.neighbors import Retriever
from cm3leon_jax.run.run import Run
from cm3leon_jax.stages import stages
from cm3leon_jax.stages.shards import Runner
from tests.data.stores import VOCAB
from tests.generation.run import SETTINGS, save_run
from tests.launched import SLOW, launch
from tests.refusals import check_sentence, refused

STAGES = ("raw", "documents", "neighbors")
BACKEND = "scann" if importlib.util.find_spec("scann") else "exact"
KEY, CAPTION = "k1 of the owner", "a yellow submarine"
COUNT, ROWS = 30, 4  # Documents of the bank; two have the key, and each has a random crop.


def settings_of(root):
  fields = {
    "raw": {"source": str(root / "source"), "resolution": 8, "crops": 1},
    "retrieval": {"backend": BACKEND},
    "data": {"pack_window": 64, "text_share": 0.0},
    "train": {"global_batch_size": 4},
  }
  sections = {k: dataclasses.replace(getattr(SETTINGS, k), **v) for k, v in fields.items()}
  return dataclasses.replace(SETTINGS, **sections)


def write_source(folder, name):
  (folder / name).mkdir(parents=True)
  pairs, rng = [], np.random.default_rng(ord(name))
  for i in range(12):
    Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(folder / name / f"{i}.png")
    about = {"key": f"{name}{i}", "caption": f"pair {name} {i}", "image": f"{i}.png"}
    about |= {"key": KEY, "caption": CAPTION, "group": "the group"} if i == 1 else {}
    pairs.append({**about, "split": ("train", "train", "bank", "heldout")[i % 4]})
  lines = "".join(json.dumps(pair) + "\n" for pair in pairs)
  (folder / name / "pairs.jsonl").write_text(lines)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """Runs the stages raw, documents and neighbors on 24 pairs in two shards."""
  root = epath.Path(tmp_path_factory.mktemp("run"))
  save_run(root)
  settings, runner, folders = settings_of(root), Runner(), [str(root / name) for name in STAGES]
  for name in STAGES:
    shutil.rmtree(root / name, ignore_errors=True)
  for name in ("a", "b"):
    write_source(root / "source", name)
  with stages.stage(root, "raw", settings):
    ingest.prepare(settings.raw, ingest.parts_of(settings.raw), folders[0], runner)
  load = functools.partial(encode.load_tokenizers, root, VOCAB)
  with stages.stage(root, "documents", settings):
    job = encode.EncodeJob(folders[0], folders[1], load, VOCAB, 8, 512)
    encode.encode_documents(job, {}, runner)
  clip = functools.partial(bank_lib.load_clip, "", root, VOCAB)
  with stages.stage(root, "neighbors", settings):
    job = bank_lib.EmbedJob(folders[0], folders[2], clip, 0.1, 0, {})
    neighbors.build_neighbors(settings.retrieval, job, settings.clip.embed_dim, {}, runner)
  return root


@pytest.fixture
def root(made, tmp_path):
  return epath.Path(shutil.copytree(made, tmp_path / "run"))


def erase(root, *keys):
  removed.remove(root / "neighbors", keys, functools.partial(erased.erase, root))


def traces_of(root) -> dict[str, bytes]:
  """Returns the bytes of what the documents contain: texts, codes, pixels and embeddings."""
  folder, bank = root / "neighbors", Bank(root / "documents", VOCAB)
  traces = {"key": KEY.encode(), "caption": CAPTION.encode(), "group": b"the group"}
  for row in removed.rows(folder, [KEY]).tolist():
    traces |= {f"{row}.{i}": s.tokens.tobytes() for i, s in enumerate(bank[row].segments)}
    for name in ("documents", "queries", "images"):
      traces[f"{row}.{name}"] = ArrayStore(folder / "train" / name)[row].tobytes()
    if BACKEND == "scann":
      vector = ArrayStore(folder / "train" / "documents")[row]
      traces[f"{row}.index"] = vector.astype(np.float32).tobytes()
  pairs = [pair for pair in reader.read_pairs(root / "raw", "train") if KEY in pair.key]
  assert len(pairs) == ROWS
  return traces | {pair.image: epath.Path(pair.image).read_bytes() for pair in pairs}


def found_in(root, traces) -> set[str]:
  """Returns the names of the traces in files of the stages, also in compressed records."""
  found = set()
  paths = (path for name in STAGES for path in pathlib.Path(root / name).rglob("*"))
  for path in filter(pathlib.Path.is_file, paths):
    content = path.read_bytes()
    if path.suffix == ".array_record":
      records = array_record_module.ArrayRecordReader(str(path))
      content += b"".join(records.read_all()) if records.num_records() else b""
    found |= {name for name, trace in traces.items() if trace in content}
  return found


def check_opens(root) -> list[dict[str, np.ndarray]]:
  """Opens what trainings, samples and reports read, and returns rows of the training."""
  for name in STAGES:
    stages.require(root, name)
    stages.check_files(root / name)
  for split in ("train", "heldout", "bank"):
    reader.read_pairs(root / "raw", split)
  bank = Bank(root / "documents", VOCAB)
  assert len([bank[i] for i in range(COUNT)]) == len(bank)
  retriever = Retriever(root / "neighbors", settings_of(root).retrieval)
  ids, _ = retriever.retrieve(retriever.bank.queries[:].astype(np.float32))
  assert not np.isin(ids, removed.rows(root / "neighbors")).any()
  assert (ids >= 0).any(1).all()
  loader = Run(root, settings_of(root)).rows("train")
  rows = [loader[i] for i in range(8)]
  del bank, loader
  gc.collect()  # Closes the shards.
  return rows


def test_no_file_has_a_trace_and_all_others_stay(root):
  traces, ids = traces_of(root), [stages.require(root, name)["id"] for name in STAGES]
  assert found_in(root, traces) == set(traces)  # Negative control.
  gone, bank = removed.rows(root / "neighbors", [KEY]), Bank(root / "documents", VOCAB)
  documents = [bank[i] for i in range(COUNT)]
  erase(root, "a2")  # Of the split `bank`.
  erase(root, KEY)
  assert found_in(root, traces) == set()
  assert [stages.require(root, name)["id"] for name in STAGES] == ids
  check_opens(root)
  validate_stores(root / "documents", VOCAB)
  validate_raw(root / "raw", 2)
  bank = Bank(root / "documents", VOCAB)
  for i, document in enumerate(documents):
    is_erased = i in gone or document.key == "a2"
    assert (bank[i].key == "") == is_erased
    assert (repr(bank[i]) == repr(document)) != is_erased


def test_an_erased_document_has_no_loss_and_the_rows_stay_the_same(root, tmp_path):
  other = epath.Path(shutil.copytree(root, tmp_path / "other"))
  removed.remove(other / "neighbors", [KEY])
  erase(root, KEY)
  different = 0
  for kept, row in zip(check_opens(other), check_opens(root)):
    np.testing.assert_array_equal(kept["segment_ids"], row["segment_ids"])
    changed = set(row["segment_ids"][kept["targets"] != row["targets"]].tolist())
    in_changed = np.isin(row["segment_ids"], [*changed])
    expected = np.where(in_changed, 0, kept["loss_weights"])
    np.testing.assert_array_equal(row["loss_weights"], expected)
    different += len(changed)
  assert different


class Killed(BaseException):
  pass


@pytest.mark.parametrize("every", [8, pytest.param(1, marks=pytest.mark.slow)])
def test_after_a_kill_at_any_moment_the_run_opens_and_the_command_completes(
  root, monkeypatch, every
):
  traces, left = traces_of(root), [0]

  def or_killed(function):
    def call(*args, **kwargs):
      left[0] -= 1
      if left[0] < 0:
        raise Killed
      return function(*args, **kwargs)

    return call

  kills = 0
  for at in range(0, 100, every):
    left[0] = at
    with monkeypatch.context() as patch:
      patch.setattr(os, "replace", or_killed(os.replace))
      patch.setattr(ArrayStore, "write", or_killed(ArrayStore.write))
      try:
        erase(root, KEY)
        break
      except Killed:
        kills += 1
    check_opens(root)
  assert kills > 30 // every
  assert found_in(root, traces) == set()
  check_opens(root)


def test_two_at_once_wait_for_each_other(root):
  events = []

  def slow(rows):
    events.append("begins")
    time.sleep(0.2)
    erased.erase(root, rows)
    events.append("ends")

  with futures.ThreadPoolExecutor() as pool:
    jobs = [pool.submit(removed.remove, root / "neighbors", [k], slow) for k in (KEY, "b5")]
    [job.result() for job in jobs]
  assert events == ["begins", "ends"] * 2
  check_opens(root)
  validate_stores(root / "documents", VOCAB)
  assert len(removed.rows(root / "neighbors")) == ROWS + 2


def test_documents_of_other_files_are_not_erased(root):
  about = read_json(root / "documents" / stages.DONE)
  about["config"]["inputs"]["raw"] = "other"
  write_json(root / "documents" / stages.DONE, about)
  traces = traces_of(root)
  with refused(UserError, str(root), "nothing is erased", "encode_documents"):
    erase(root, KEY)
  assert found_in(root, traces) == set(traces)


def test_the_command_says_what_is_left(root):
  flags = (f"--workdir={root}", f"--document={KEY}", "--erase")
  for _ in range(2):  # A repeated command has nothing left to do.
    result = launch("bank", "remove", *flags, imported=SLOW)
    assert result.returncode == 0, result.stderr
    where = f"erased from raw, documents and neighbors of {root}"
    check_sentence(result.stdout, where, KEY, "The source /", "exports made before are not changed")
  assert KEY not in (root / "neighbors" / removed.FILE).read_text()

"""Tests that messages name damaged files of a workdir, and that reading a file executes no code."""

import ast
import json
import pathlib

from etils import epath
from hypothesis import example, given, settings
from hypothesis import strategies as st
import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest
from safetensors import numpy as safetensors

import cm3leon_jax
from cm3leon_jax.clip.model import CLIP
from cm3leon_jax.data.documents.store import DocumentStore
from cm3leon_jax.data.raw import reader
from cm3leon_jax.data.rows.plan_starts import Start, WindowStarts
from cm3leon_jax.errors import UserError
from cm3leon_jax.evaluation.metrics import published_weights as published
from cm3leon_jax.files.json_files import read_json, read_json_lines, write_json
from cm3leon_jax.importing.source import open_source
from cm3leon_jax.importing.tokenizer import read_tokenizer
from cm3leon_jax.reports import summary
from cm3leon_jax.retrieval import bank, lexical
from cm3leon_jax.retrieval.arrays import ArrayStore
from cm3leon_jax.run import bundles, initial
from cm3leon_jax.run.source import settings_of_run
from cm3leon_jax.stages import shards, stages
from cm3leon_jax.tokenizers.vqgan import ImageTokenizer
from cm3leon_jax.training.watch.metrics import MetricsLog, check_log
from cm3leon_jax.weights import recovery, stored_tensors
from cm3leon_jax.weights.checkpoint import Checkpoints
from cm3leon_jax.weights.stored_tensors import StoredTensors
from tests.data.stores import VOCAB
from tests.generation.run import SETTINGS, one_device
from tests.refusals import refused

JUNK = {
  "an empty object": b"{}",
  "an empty list": b"[]",
  "null": b"null",
  "a number": b"3",
  "other types": json.dumps(
    dict.fromkeys(
      ("config", "summary", "seconds", "id", "run", "settings", "shards", "origins", "clip")
      + ("vqgan", "num_codes", "text_size", "digests", "step", "vocab", "rows", "counts"),
      True,
    )
    | {"schema_version": 1}
  ).encode(),
  "no UTF-8": b"\x00\xff\xfe",
  "no end": b'{"config": {',
  "deep nesting": b"[" * 100_000 + b"]" * 100_000,
  "too many digits": b"9" * 5_000,
  "nothing": b"",
}


class Job:
  def open(self):
    return lambda name: {"n": 1}


def run_shards(folder):
  runner = shards.Runner()
  return list(shards.run_shards(Job(), {"a": {"b": 1}}, folder, runner, "shards"))


# File name -> function that reads the file, given the folder.
READERS = {
  "documents/done.json": lambda root: stages.require(root, "documents"),
  "raw/done.json": lambda root: stages.once(root / "raw", {"a": 1}).__enter__(),
  "train/done.json": summary.collect,
  "train/config.json": settings_of_run,
  "run/train/config.json": lambda root: initial.find(SETTINGS, str(root / "run")),
  "start/train/config.json": lambda root: initial.recorded(root / "start"),
  "raw/index.json": lambda root: reader.read_index(root / "raw"),
  "store/index.json": lambda root: DocumentStore(root / "store", VOCAB),
  "array/index.json": lambda root: ArrayStore(root / "array"),
  "clip/config.json": lambda root: CLIP.load(root / "clip"),
  "own/clip/config.json": lambda root: bank.embedding_width("", root / "own"),
  "vqgan/config.json": lambda root: ImageTokenizer.load(root / "vqgan"),
  "bundle/bundle.json": lambda root: bundles.read(root / "bundle"),
  f"bank/{lexical.FILE}": lambda root: lexical.load(root / "bank", 0.5, 8),
  "source/config.json": lambda root: open_source(str(root / "source")),
  "several/model.safetensors.index.json": lambda root: StoredTensors(root / "several"),
  "text/tokenizer.json": lambda root: read_tokenizer(root / "text", 9),
  "done/a.json": lambda root: run_shards(root / "done"),
}


@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize("name", READERS)
def test_junk_is_named_in_one_sentence(name, junk, tmp_path):
  path = tmp_path / name
  path.parent.mkdir(parents=True)
  path.write_bytes(JUNK[junk])
  with pytest.raises(UserError) as error:
    READERS[name](tmp_path)
  assert str(error.value).isprintable()
  assert path.name in str(error.value) or "config" in str(error.value)
  assert len(str(error.value)) < 600


LINES = [b'{"step": 1, "loss": 2.0}', b'{"step": 2, "loss": 1.0}', b'{"step": 3, "loss": 0.5}']


@pytest.mark.parametrize(
  ("line", "sentence"),
  [
    (b"\x00\xff", "line 2 is not valid JSON"),
    (b"{", "line 2 is not valid JSON"),
    (b"[" * 100_000, "line 2 is not valid JSON"),
    (b"{}", "line 2: its field 'step' must be of type whole number, but is None."),
    (b"3", "line 2: it must be a JSON object, but is 3."),
  ],
)
def test_a_bad_line_within_the_log_is_named(line, sentence, tmp_path):
  log = tmp_path / "train" / "metrics" / "metrics.jsonl"
  log.parent.mkdir(parents=True)
  log.write_bytes(b"\n".join([LINES[0], line, *LINES[1:]]) + b"\n")
  for read in (
    lambda: MetricsLog(log.parent, 1),
    lambda: check_log(epath.Path(tmp_path / "train"), 1),
    lambda: summary.collect(tmp_path),
  ):
    with pytest.raises(UserError) as error:
      read()
    assert f"metrics.jsonl, {sentence}" in str(error.value)
    assert "Delete this line" in str(error.value) or "delete this line" in str(error.value)
  log.write_bytes(b"\n".join(LINES) + b"\n{")  # Ends with an incomplete line, as after a kill.
  assert len(read_json_lines(log)) == 3


@pytest.mark.parametrize("junk", [*JUNK.values(), b'{"window": 2, "first_row": -1}'])
def test_a_bad_line_of_planned_windows_is_named(junk, tmp_path):
  path, start = tmp_path / "plan.jsonl", Start(9, (4, 0), (70, 0))
  starts = WindowStarts(Start(0, (0, 0), (0, 0)), path, "x", writes=True)
  starts.add(1, start)
  path.write_bytes(path.read_bytes() + junk.replace(b"\n", b"") + b"\n")
  with refused(UserError, "plan.jsonl", "3"):
    WindowStarts(Start(0, (0, 0), (0, 0)), path, "x")


def test_stray_files_beside_digests_are_left_alone(tmp_path):
  """Regression: unrelated files were read as the digests of a step."""
  with one_device():
    state = {"w": jax.device_put(np.ones(2), NamedSharding(jax.sharding.get_mesh(), P()))}
    checkpoints = Checkpoints(tmp_path, 1)
    folder = tmp_path / "checkpoints.digests"
    folder.mkdir(exist_ok=True)
    strays = {".DS_Store", "notes.txt", "x.json", "-1.json", "1e3.part0", "٣x.json"}
    for name in strays:
      (folder / name).write_bytes(b"\x00\xff")
    for step in (1, 2):
      checkpoints.save(state, step, 0)
    checkpoints.wait()
    assert recovery.newest_whole(checkpoints) == 2
    checkpoints.close()
  assert {path.name for path in folder.iterdir()} == strays | {"2.json"}


JSON = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
  lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
  max_leaves=4,
)
FIELDS = {"a": dict, "b": int, "c": float, "d": str, "e": list}
RIGHT = {"a": {}, "b": 1, "c": 2, "d": "x", "e": []}


@given(st.dictionaries(st.sampled_from(list(FIELDS)), JSON))
@example({"b": True})
@example({"c": 1.5})
@settings(max_examples=100, deadline=None)
def test_fields_have_their_types_or_are_named(tmp_path_factory, changed):
  path = tmp_path_factory.mktemp("json", numbered=True) / "x.json"
  write_json(path, {**RIGHT, **changed})
  try:
    found = read_json(path, FIELDS)
  except UserError as error:
    assert any(f"its field '{name}'" in str(error) for name in changed)  # noqa: PT017
    return
  assert set(found) >= set(FIELDS)
  assert all(isinstance(found[n], (int, float) if k is float else k) for n, k in FIELDS.items())


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_tensors_that_are_not_finite_are_refused_with_file_and_name(value, tmp_path):
  tensors = {"a": np.ones(3, np.float32), "b.c": np.array([1, value], np.float16)}
  path = tmp_path / "x.safetensors"
  safetensors.save_file(tensors, path)
  expected = {"a": jax.ShapeDtypeStruct((3,), np.float32), "b": {"c": np.zeros(2, np.float16)}}
  with refused(UserError, "b.c", "train_clip"):
    stored_tensors.load(path, expected, "train_clip")
  with refused(UserError, "b.c", "x.safetensors"):
    published.read_tensors(path)
  safetensors.save_file({**tensors, "b.c": np.ones(2, np.float16)}, path)
  assert set(stored_tensors.load(path, expected, "train_clip")) == {"a", "b"}
  assert set(published.read_tensors(path)) == {"a", "b.c"}


# Modules and functions that execute code from the files that they read.
UNSAFE_MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "code"}
UNSAFE_CALLS = {"torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "pd.read_pickle"}
PACKAGE = pathlib.Path(cm3leon_jax.__file__).parent


def unsafe(source: str) -> list[str]:
  """Returns the imports and calls in `source` that could execute code from a file."""
  found = []
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      found += [a.name for a in node.names if a.name.partition(".")[0] in UNSAFE_MODULES]
    elif isinstance(node, ast.ImportFrom) and node.module:
      found += [node.module] if node.module.partition(".")[0] in UNSAFE_MODULES else []
    elif isinstance(node, ast.Attribute) and ast.unparse(node) in UNSAFE_CALLS:
      found.append(ast.unparse(node))
    elif isinstance(node, ast.keyword):
      allowed = node.arg == "allow_pickle" and ast.unparse(node.value) != "False"
      remote = node.arg == "trust_remote_code" and ast.unparse(node.value) != "False"
      found += [f"{node.arg}={ast.unparse(node.value)}"] if allowed or remote else []
  return found


def test_nothing_is_unpickled():
  files = [*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "launch").rglob("*.py")]
  assert len(files) > 200
  assert {str(f): u for f in files if (u := unsafe(f.read_text(encoding="utf-8")))} == {}


@pytest.mark.parametrize(
  "source",
  [
    "import pickle", "from joblib import load", "np.load(f, allow_pickle=True)", "torch.load(f)",
    "np.load(f, allow_pickle=flag)", "yaml.load(f, Loader)", "f(x, trust_remote_code=True)",
  ],
)  # fmt: skip
def test_what_could_run_code_is_found(source):
  assert len(unsafe(source)) == 1
  assert unsafe("np.load(f, allow_pickle=False)\nyaml.safe_load(f)\nimport json") == []

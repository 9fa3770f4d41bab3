"""Tests the documents of a run that its bundle contains for replay."""

import dataclasses
import shutil

from etils import epath
import pytest

from cm3leon_jax.export import bundle, replay
from cm3leon_jax.files.json_files import read_json
from cm3leon_jax.retrieval import removed
from cm3leon_jax.run import base_documents, bundles
from cm3leon_jax.run.rows import document_sources
from cm3leon_jax.run.run import Run
from cm3leon_jax.weights import reading
from tests.generation.run import SETTINGS, one_device

NO_TEXTS = dataclasses.replace(SETTINGS.data, text_share=0.0)


@pytest.fixture(scope="module")
def params(run):
  with one_device():
    return reading.load_params(run / "train", SETTINGS.model)


def rows_of(folder, split):
  """Returns {key of a pair: (its token ids, keys of its best neighbors)}."""
  settings = dataclasses.replace(SETTINGS, data=NO_TEXTS)
  [source] = document_sources(settings, folder, split, 1.0)
  found = {}
  for row, ids in enumerate(source.neighbors):
    pair = source.store[row]
    best = [source.bank[int(i)].key for i in ids if i >= 0][: NO_TEXTS.num_neighbors]
    found[pair.key] = ([x.tokens.tolist() for x in pair.segments], best)
  return found


def test_a_bundle_has_a_sample_of_the_documents_with_their_best_neighbors(
  run, params, tmp_path, monkeypatch
):
  monkeypatch.setattr(replay, "HELDOUT", 3)
  bundle.write(tmp_path, Run(run, SETTINGS), *params, replayed=7)
  found, folder = base_documents.find(str(tmp_path))
  assert folder == epath.Path(tmp_path) / bundles.REPLAY
  assert found.data == NO_TEXTS
  for split, number in (("train", 7), ("heldout", 3)):
    whole, sample = (rows_of(at, split) for at in (run, folder))
    assert len(sample) == number
    assert sample.items() <= whole.items()
  digests = read_json(epath.Path(tmp_path) / bundles.FILE)["digests"]
  names = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
  assert names - {*digests} == {bundles.FILE}


def test_removed_documents_are_left_out(run, params, tmp_path):
  shutil.copytree(run, tmp_path / "run")
  copy, gone = epath.Path(tmp_path / "run"), [*rows_of(run, "train")][:3]
  removed.remove(copy / "neighbors", gone)
  bundle.write(tmp_path / "bundle", Run(copy, SETTINGS), *params, replayed=12)
  found = rows_of(epath.Path(tmp_path / "bundle") / bundles.REPLAY, "train")
  assert found.keys() == rows_of(run, "train").keys() - {*gone}
  best = {key for _, keys in found.values() for key in keys}
  assert best
  assert not best & {*gone}
  assert {key for _, keys in rows_of(run, "train").values() for key in keys} & {*gone}


def test_a_sample_depends_on_the_seed_alone_and_may_be_left_out(run, params, tmp_path):
  keys, digests = [], []
  for seed in (0, 0, 1):
    bundle.write(tmp_path, Run(run, dataclasses.replace(SETTINGS, seed=seed)), *params, replayed=7)
    keys.append([*rows_of(epath.Path(tmp_path) / bundles.REPLAY, "train")])
    digests.append(read_json(epath.Path(tmp_path) / bundles.FILE)["digests"])
  assert keys[0] == keys[1] != keys[2]
  assert digests[0] == digests[1]
  bundle.write(tmp_path, Run(run, SETTINGS), *params, replayed=0)
  assert base_documents.find(str(tmp_path))[1] is None

import dataclasses
import shutil

from etils import epath
import jax
import numpy as np
import pytest

from cm3leon_jax import CM3Leon, UserError
from cm3leon_jax.data.documents.store import DocumentStore
from cm3leon_jax.export import bundle
from cm3leon_jax.run import bundles, initial
from cm3leon_jax.run.run import Run
from cm3leon_jax.weights import reading
from tests.export.conftest import with_bank
from tests.generation.run import SETTINGS, one_device
from tests.models.tiny import mesh_of
from tests.refusals import refused


@pytest.fixture(scope="module")
def bundled(run):
  folder = run.parent / f"{run.name}_bundle"
  with one_device():
    params, step = reading.load_params(run / "train", SETTINGS.model)
    numbers = bundle.write(folder, Run(run, SETTINGS), params, step)
  assert numbers["bytes"] == sum(p.stat().length for p in files(folder) if p.name != bundles.FILE)
  return folder


def files(folder):
  return [epath.Path(root) / name for root, _, names in folder.walk() for name in names]


def test_parameters_are_those_of_the_run_rounded_to_float16(run, bundled):
  with jax.set_mesh(mesh_of(2, 2, 2)):
    found, step = Run.open(bundled).params()
    expected, _ = Run.open(run).params()
  assert step == 7
  expected = jax.tree.map(lambda x: np.asarray(x.astype("float16").astype("float32")), expected)
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), expected)
  assert {x.dtype.name for x in jax.tree.leaves(found)} == {"float32"}


def test_it_names_no_function_of_the_users_files_and_has_small_files(run, tmp_path, monkeypatch):
  monkeypatch.setattr(bundle, "FILE_BYTES", 2_000)
  raw = dataclasses.replace(SETTINGS.raw, source="/home/ada/own.py:blue", options={"size": 1})
  evaluation = dataclasses.replace(SETTINGS.evaluation, judge="/home/ada/own.py:right")
  settings = dataclasses.replace(SETTINGS, raw=raw, evaluation=evaluation)
  folder = epath.Path(tmp_path / "bundle")
  with one_device():
    params, step = reading.load_params(run / "train", SETTINGS.model)
    bundle.write(folder, Run(run, settings), params, step)
    found, _ = Run.open(folder).params()
  assert "/home/ada" not in (folder / bundles.FILE).read_text()
  stored, _ = bundles.read(folder)
  assert stored.raw == dataclasses.replace(raw, source="", options={})
  assert stored.evaluation == dataclasses.replace(evaluation, judge="")
  assert 1 < len([*folder.glob("model-*.safetensors")]) < 2 * bundle.MOST_FILES
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), found, params)


def test_a_refused_bundle_leaves_what_is_there(run, bundled, tmp_path):
  workdir, folder = epath.Path(tmp_path / "run"), epath.Path(tmp_path / "bundle")
  shutil.copytree(run, workdir)
  shutil.copytree(bundled, folder)
  before = {path: path.read_bytes() for path in [*files(workdir), *files(folder)]}
  with one_device():
    params, step = reading.load_params(run / "train", SETTINGS.model)
    with refused(UserError, str(workdir)):
      bundle.write(workdir, Run(workdir, SETTINGS), params, step)
    model = dataclasses.replace(SETTINGS.model, query_key_norm=True)
    with refused(UserError, "query_key_norm"):
      bundle.write(folder, Run(workdir, dataclasses.replace(SETTINGS, model=model)), params, step)
  assert {path: path.read_bytes() for path in [*files(workdir), *files(folder)]} == before


def test_a_folder_with_files_of_others_is_refused_and_keeps_them(run, tmp_path):
  kept = tmp_path / "documents" / "mine.txt"
  kept.parent.mkdir()
  kept.write_text("mine")
  with one_device():
    params, step = reading.load_params(run / "train", SETTINGS.model)
    for folder, fact in ((tmp_path, "'documents'"), (kept, "is a file")):
      with refused(UserError, fact):
        bundle.write(epath.Path(folder), Run(run, SETTINGS), params, step)
  assert kept.read_text() == "mine"


@pytest.mark.slow
def test_it_generates_without_the_run_from_the_same_documents(run, bundled, tmp_path):
  moved = tmp_path / "moved"
  shutil.copytree(bundled, moved)
  with one_device() as mesh:
    model, whole = (CM3Leon.load(folder, mesh=mesh) for folder in (moved, run))
  assert model.step == 7
  kept = {"backend": "exact", "train_documents": False}
  retrieval = dataclasses.replace(SETTINGS.retrieval, **kept)
  assert model.pipeline.settings == dataclasses.replace(SETTINGS, retrieval=retrieval)
  expected = [document.key for document in whole.retrieve("a red bell", k=5)]
  assert [document.key for document in model.retrieve("a red bell", k=5)] == expected
  [sample] = model.generate("a red bell", seed=1)
  assert [document.key for document in sample.neighbors] == expected[: len(sample.neighbors)]
  assert (len(sample.neighbors), sample.image.size) == (SETTINGS.data.num_neighbors, (8, 8))
  assert sample.clip_score is not None


@pytest.mark.slow
def test_it_has_no_bank_if_the_run_retrieves_too_many_documents(run, tmp_path, monkeypatch):
  monkeypatch.setattr(bundle, "MOST_DOCUMENTS", 3)
  with one_device() as mesh:
    params, step = reading.load_params(run / "train", SETTINGS.model)
    bundle.write(tmp_path / "bundle", Run(run, SETTINGS), params, step)
    model = CM3Leon.load(tmp_path / "bundle", mesh=mesh)
  assert model.generate("a red bell", seed=1)[0].neighbors == ()
  with pytest.raises(UserError, match="retrieve is 1, but there is no bank"):
    model.generate("a red bell", retrieve=1)


@pytest.mark.slow
def test_it_has_the_bank_of_a_run_that_retrieves_from_nothing_else(run, tmp_path):
  """Given a run that retrieves only from the split `bank`, the bundle has only these documents."""
  copied, folder = with_bank(run, epath.Path(tmp_path / "run")), tmp_path / "bundle"
  last = DocumentStore(copied.folder / "documents" / "bank_pairs", SETTINGS.vocab)
  with one_device() as mesh:
    params, step = reading.load_params(run / "train", SETTINGS.model)
    bundle.write(folder, copied, params, step)
    model = CM3Leon.load(folder, mesh=mesh)
    whole = CM3Leon.load(run, mesh=mesh)
  found = [x.key for x in model.retrieve("a red bell", k=5)]
  assert set(found) <= {last[i].key for i in range(5)}
  among_all = [x.key for x in whole.retrieve("a red bell", k=20)]
  assert found[0] == next(key for key in among_all if key in found)
  [sample] = model.generate("a red bell", seed=1)
  assert [document.key for document in sample.neighbors] == found[: SETTINGS.data.num_neighbors]
  # Writing a bundle without a bank over this one removes the bank.
  data = dataclasses.replace(SETTINGS.data, num_neighbors=0)
  bundle.write(folder, Run(run, dataclasses.replace(SETTINGS, data=data)), params, step)
  assert not (epath.Path(folder) / "documents").exists()


@pytest.fixture(scope="module")
def tuned(run, bundled, tmp_path_factory):
  """Returns the run with the tokenizers and CLIP of its bundle, as after `copy_tokenizers`."""
  folder = epath.Path(tmp_path_factory.mktemp("tuned")) / "run"
  shutil.copytree(run, folder)
  for stage, names in bundles.FILES.items():
    for name in names:
      (bundled / stage / name).copy(folder / stage / name, overwrite=True)
  return folder


@pytest.mark.slow
def test_a_bundle_on_a_base_generates_what_a_whole_one_does(tuned, bundled, tmp_path):
  whole, based = epath.Path(tmp_path / "whole"), epath.Path(tmp_path / "based")
  models = []
  with one_device() as mesh:
    params, step = reading.load_params(tuned / "train", SETTINGS.model)
    bundle.write(whole, Run(tuned, SETTINGS), params, step)
    shutil.copytree(whole, based)
    bundle.write(based, Run(tuned, SETTINGS), params, step, base=str(bundled))
    for folder in (whole, based):
      models.append(CM3Leon.load(folder, mesh=mesh))
  assert {path.parent for path in files(based)} == {based}
  assert {path.relative_to(based) for path in files(based)} < {
    path.relative_to(whole) for path in files(whole)
  }
  [expected], [sample] = (model.generate("a red bell", seed=1) for model in models)
  np.testing.assert_array_equal(sample.tokens, expected.tokens)
  assert sample.clip_score == expected.clip_score
  with one_device():
    found, step = Run.open(based).params()
  assert found.keys() == params.keys()
  assert step == 7
  assert initial.other_tokenizers(str(based), tuned) == []
  with refused(UserError, "--base"):
    bundle.write(tmp_path / "third", Run(tuned, SETTINGS), {}, 7, base=str(based))


def test_another_base_than_the_one_named_is_refused(tuned, bundled, tmp_path):
  base, based = tmp_path / "base", tmp_path / "based"
  shutil.copytree(bundled, base)
  with one_device():
    params, step = reading.load_params(tuned / "train", SETTINGS.model)
    bundle.write(based, Run(tuned, SETTINGS), params, step, base=str(base))
    bundle.write(base, Run(tuned, SETTINGS), params, step + 1)
  with refused(UserError, str(based)):
    CM3Leon.load(based)
  shutil.rmtree(base)
  with refused(UserError, str(based)):
    CM3Leon.load(based)


@pytest.mark.parametrize("name", ["model.safetensors", "clip/params.safetensors", "config.json"])
def test_a_file_of_another_content_is_refused_by_name(bundled, tmp_path, name):
  changed = epath.Path(tmp_path / "changed")
  shutil.copytree(bundled, changed)
  data = bytearray((changed / name).read_bytes())
  data[-1] ^= 1
  (changed / name).write_bytes(bytes(data))
  with refused(UserError, name):
    CM3Leon.load(changed)
  with refused(UserError, name):
    initial.find(SETTINGS, str(changed))
  (changed / name).unlink()
  with refused(UserError, name):
    bundles.read(changed)


def test_files_of_a_bundle_may_be_links(bundled, tmp_path):
  """Model hubs and package managers store files as symbolic links."""
  folder = epath.Path(tmp_path / "copy")
  shutil.copytree(bundled, folder)
  weights_file = tmp_path / "copy" / "model.safetensors"
  weights_file.rename(tmp_path / "blob")
  weights_file.symlink_to(tmp_path / "blob")
  assert bundles.read(folder) == bundles.read(bundled)

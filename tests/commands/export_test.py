import concurrent.futures
import dataclasses
import itertools
import multiprocessing
import os
import re
import resource
import shutil
import sys
from unittest import mock

from etils import epath
import numpy as np
import pytest
from safetensors import numpy as safetensors

from cm3leon_jax.commands import export
from cm3leon_jax.config import TryAgain, UserError
from cm3leon_jax.export import bundle, formats, huggingface
from cm3leon_jax.files.json_files import read_json, write_json
from cm3leon_jax.reports import model_card
from cm3leon_jax.runs import stages
from cm3leon_jax.settings import settings_from_stored
from cm3leon_jax.trained import bundles, kinds
from cm3leon_jax.trained.run import Run
from cm3leon_jax.weights import layouts
from cm3leon_jax.weights.stored import of_tree
from tests.generation.run import SETTINGS, one_device, save_run
from tests.models.tiny import random_params
from tests.refusals import refused


class Killed(Exception):
  """Simulates a kill."""


class Kill:
  """Raises `Killed` after `left` writes in a folder: opens for writing, moves, removals."""

  def __init__(self):
    self.folder, self.left = "", -1
    # An audit hook cannot be removed, so this test runs in its own process.
    sys.addaudithook(self._hear)

  def _hear(self, event, args):
    if not self.folder or event not in ("open", "os.rename", "os.remove"):
      return
    reads = event == "open" and not (isinstance(args[1], str) and set(args[1]) & set("wax+"))
    if reads or not os.fspath(args[0]).startswith(self.folder):
      return
    self.left -= 1
    if self.left < 0:
      self.folder = ""
      raise Killed


def contents(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def exported_before(tmp_path):
  """Makes a run whose export and bundle contain other weights than its checkpoint."""
  root = epath.Path(tmp_path / "run")
  save_run(root)
  with one_device():
    params = random_params(SETTINGS.model, seed=1)
    tokenizer = root / "text_tokenizer"
    huggingface.export(root / "export", params, SETTINGS.model, SETTINGS.vocab, tokenizer)
    bundle.write(root / "bundle", Run(root, SETTINGS), params, 3)
  config = stages.run_config(SETTINGS, root, "export")
  config["inputs"]["train"] = "another"
  done = {"id": "e", "config": config, "summary": {}, "seconds": 1.0, "files": {}}
  write_json(root / "export" / stages.DONE, done)
  return root


def test_the_average_is_exported_and_a_bundle_knows_its_cost(tmp_path):
  """Exports the average, because the last parameters are NaN (see `save_run`)."""
  save_run(tmp_path)
  export.main(SETTINGS, tmp_path, str(tmp_path / "bundle"))
  with one_device():
    average = random_params(SETTINGS.model)
  found = safetensors.load_file(tmp_path / "export" / huggingface.WEIGHTS)
  expected = {
    t.name: t.make() for t in layouts.tensors_of(layouts.LAYOUTS["opt"], of_tree(average))
  }
  assert found.keys() == expected.keys()
  for name, tensor in expected.items():
    np.testing.assert_array_equal(found[name], tensor)
  # `save_run` records one second for each stage.
  cost = {"train_seconds": 1.0, "other_seconds": 5.0, "machine": None}
  assert bundles.about(tmp_path / "bundle")["cost"] == cost


def with_model(settings, **fields):
  return dataclasses.replace(settings, model=dataclasses.replace(settings.model, **fields))


@pytest.fixture(scope="module")
def gelu(tmp_path_factory):
  settings = with_model(SETTINGS, activation="gelu_tanh")
  root = epath.Path(tmp_path_factory.mktemp("gelu"))
  save_run(root, settings)
  return settings, root


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_export_in_any_dtype_has_the_logits_of_its_rounded_parameters(
  gelu, tmp_path, capsys, dtype
):
  pytest.importorskip("torch")
  settings, root = gelu
  output = tmp_path / "out"
  choice = formats.Choice(dtype=dtype)
  export.main(settings, root, choice=choice, output=str(output))
  message = capsys.readouterr().out
  assert "export: OPTForCausalLM, " in message
  assert float(re.search(r"differ by at most (\S+)", message)[1]) < 1e-4
  assert ("bits per image code" in message) == (dtype != "float32")
  described = read_json(output / "export.json")
  assert settings_from_stored(described.pop("settings")) == settings
  assert described == {**vars(choice), "average": True, "step": 7}
  assert read_json(output / "config.json")["dtype"] == dtype
  assert not (root / "export").exists()


def test_int8_prints_its_effect_on_heldout_bits(gelu, tmp_path, capsys):
  pytest.importorskip("compressed_tensors")
  settings, root = gelu
  choice = formats.Choice(quantize="int8")
  export.main(settings, root, choice=choice, output=str(tmp_path / "out"))
  message = capsys.readouterr().out
  before, after = map(
    float, re.search(r"int8: (\S+) -> (\S+) bits per image code", message).groups()
  )
  assert before != after
  assert abs(before - after) < 0.1 * before
  assert float(re.search(r"differ by at most (\S+)", message)[1]) < 1e-4


def test_a_run_without_documents_is_exported_without_a_comparison(gelu, tmp_path, capsys):
  settings, root = gelu
  run = epath.Path(tmp_path / "run")
  shutil.copytree(root, run, ignore=shutil.ignore_patterns("documents"))
  export.main(settings, run)
  assert "not compared: a run without documents has no held-out" in capsys.readouterr().out
  assert stages.require(run, "export")


def test_the_stage_is_made_again_in_another_format_and_skipped_in_the_same(gelu, capsys):
  settings, root = gelu
  orbax = formats.Choice("orbax")
  for choice, expected in ((orbax, "orbax, "), (orbax, "skipped"), (formats.Choice(), "OPTFor")):
    export.main(settings, root, choice=choice)
    assert expected in capsys.readouterr().out
  assert (root / "export" / huggingface.WEIGHTS).exists()
  assert not (root / "export" / "params").exists()
  shutil.rmtree(root / "export")


def test_the_last_parameters_are_written_if_they_are_asked_for(gelu, tmp_path):
  """Tries to export the last parameters, which are NaN (see `save_run`) and therefore rejected."""
  settings, root = gelu
  choice, output = formats.Choice(average=False), str(tmp_path / "out")
  with refused(UserError, "--dtype", "embed_tokens.weight"):
    export.main(settings, root, choice=choice, output=output)
  assert not (tmp_path / "out").exists()


def test_what_a_format_lacks_is_refused_by_name_and_an_earlier_export_stays(exported_before):
  before = contents(exported_before / "export")
  for settings, choice in (
    (with_model(SETTINGS, query_key_norm=True), formats.Choice()),
    (SETTINGS, formats.Choice("orbax", quantize="int8")),
  ):
    with refused(UserError, "format"):
      export.main(settings, exported_before, choice=choice)
  assert contents(exported_before / "export") == before


@pytest.mark.parametrize("output", ["", "out"])
def test_another_config_or_no_workdir_is_refused_without_advice_to_delete(gelu, tmp_path, output):
  settings, root = gelu
  output = output and str(tmp_path / output)
  before = contents(root / "train")
  with refused(UserError, "--config", "--workdir"):
    export.main(with_model(settings, width=64), root, output=output)
  absent = epath.Path(tmp_path / "absent")
  with refused(UserError, "workdir", "installed"):
    export.main(settings, absent, output=output)
  assert list(tmp_path.iterdir()) == []
  assert contents(root / "train") == before
  assert not (root / "export").exists()


def test_an_output_replaces_an_export_and_nothing_else(gelu, tmp_path, monkeypatch):
  settings, root = gelu
  orbax, output = formats.Choice("orbax"), tmp_path / "out"
  output.mkdir()
  export.main(settings, root, choice=orbax, output=str(output))
  before = contents(output)
  with monkeypatch.context() as patch:
    patch.setattr(formats, "write", mock.Mock(side_effect=Killed))
    with pytest.raises(Killed):
      export.main(settings, root, choice=orbax, output=str(output))
  assert contents(output) == before
  assert [path.name for path in tmp_path.iterdir()] == ["out"]
  # As after a kill between the two renames of an export.
  output.rename(tmp_path / "out.old")
  with monkeypatch.context() as patch:
    patch.setattr(formats, "write", mock.Mock(side_effect=Killed))
    with pytest.raises(Killed):
      export.main(settings, root, choice=orbax, output=str(output))
  assert contents(output) == before
  export.main(settings, root, choice=formats.Choice("orbax", "float16"), output=str(output))
  assert contents(output) != before
  assert [path.name for path in tmp_path.iterdir()] == ["out"]
  (output / kinds.ABOUT).unlink()
  with refused(UserError, "--output", "another"):
    export.main(settings, root, choice=orbax, output=str(output))
  with refused(UserError, "--output", "workdir"):
    export.main(settings, root, choice=orbax, output="gs://bucket/out")


@mock.patch.object(huggingface, "can_compare", new=mock.Mock(return_value=False))
def kill_at_any_write(exported_before, tmp_path):
  """Kills an export at each write; returns (has weights, is finished, step of the bundle)."""
  # The run folders have the same name, because an export records the name.
  kill, whole, work = Kill(), tmp_path / "whole" / "run", tmp_path / "work" / "run"
  shutil.copytree(exported_before, whole)
  export.main(SETTINGS, epath.Path(whole), str(whole / "bundle"))
  old, new = contents(exported_before / "export"), contents(whole / "export")
  states = set()
  for left in itertools.count():
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(exported_before, work)
    kill.left, kill.folder = left, str(work)
    try:
      export.main(SETTINGS, epath.Path(work), str(work / "bundle"))
      break
    except Killed:
      pass
    finally:
      kill.folder = ""
    found = contents(work / "export")
    counts = stages.DONE in found and found[stages.DONE] != old[stages.DONE]
    weights = found.get(huggingface.WEIGHTS)
    # Loaders read an export without the last two files, and do not read the first two.
    about = (stages.DONE, model_card.CARD, "training_data.json", kinds.DIGESTS)
    if weights is not None:
      expected = new if weights == new[huggingface.WEIGHTS] else old
      assert expected[huggingface.WEIGHTS] == weights
      assert all(found[name] == expected[name] for name in expected if name not in about)
    assert not counts or weights == new[huggingface.WEIGHTS]
    step = 0
    if bundles.is_bundle(work / "bundle"):
      _, step = bundles.read(work / "bundle")
    states.add((weights is not None, counts, step))
  kill.left, kill.folder = left // 3, str(work)
  shutil.rmtree(work / "export")
  with pytest.raises(Killed):
    export.main(SETTINGS, epath.Path(work), str(work / "bundle"))
  export.main(SETTINGS, epath.Path(work), str(work / "bundle"))
  assert {name: x for name, x in contents(work / "export").items() if name != stages.DONE} == {
    name: x for name, x in new.items() if name != stages.DONE
  }
  return states


@pytest.mark.slow
def test_an_export_that_is_killed_at_any_write_is_whole_or_counts_as_none(
  exported_before, tmp_path
):
  """Kills an export that replaces an older one; the next start of the command completes it."""
  with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
    states = pool.submit(kill_at_any_write, exported_before, tmp_path).result(timeout=600)
  assert states == {(True, False, 3), (False, False, 3), (True, True, 3), (True, True, 0)}


def test_an_export_on_a_full_disk_is_one_sentence_and_counts_as_none(exported_before, monkeypatch):
  monkeypatch.setattr(huggingface, "can_compare", lambda quantized: False)
  target = str(exported_before / "bundle")
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
  try:
    with refused(TryAgain, "written", "partial"):
      export.main(SETTINGS, exported_before, target)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert not (exported_before / "export" / stages.DONE).exists()
  assert not (exported_before / "export" / huggingface.WEIGHTS).exists()
  assert bundles.read(epath.Path(target))[1] == 3  # The export did not change the bundle.
  export.main(SETTINGS, exported_before, target)
  assert bundles.read(epath.Path(target))[1] == 7


def test_a_file_that_cannot_be_read_is_no_matter_of_space(exported_before):
  path = exported_before / "text_tokenizer" / "tokenizer.json"
  path.unlink()
  with refused(UserError, "text_tokenizer", "tokenizer.json"):
    export.main(SETTINGS, exported_before)
  path.mkdir()
  with pytest.raises(IsADirectoryError, match=r"text_tokenizer/tokenizer\.json"):
    export.main(SETTINGS, exported_before)

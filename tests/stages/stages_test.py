import contextlib
import dataclasses
import os
import pathlib

import numpy as np
import pytest

from cm3leon_jax.config.settings import default_config, settings_from_config
from cm3leon_jax.errors import UserError
from cm3leon_jax.files.json_files import read_json, write_json
from cm3leon_jax.stages import stages, table
from tests.refusals import refused

SETTINGS = settings_from_config(default_config())


def changed(part, value):
  """Returns SETTINGS with another value for "seed" or for `section.field`."""
  section, _, field = part.partition(".")
  if field:
    value = dataclasses.replace(getattr(SETTINGS, section), **{field: value})
  return dataclasses.replace(SETTINGS, **{section: value})


def finish(workdir, *names):
  for name in names:
    with stages.once(workdir / name, {}, redo=True):
      pass
  if "train" in names:
    run = {"run": table.identity(SETTINGS, "train")}
    write_json(workdir / "train" / "config.json", run)


def test_a_finished_stage_is_skipped(tmp_path):
  with stages.once(tmp_path / "a", {"n": 1}) as summary:
    summary["value"] = 3.0
  first = read_json(tmp_path / "a" / stages.DONE)
  assert first["summary"] == {"value": 3.0}
  assert first["config"] == {"n": 1}
  with stages.once(tmp_path / "a", {"n": 1}) as summary:
    assert summary is None
  assert read_json(tmp_path / "a" / stages.DONE) == first


def test_a_source_leaves_out_the_workdir_and_finished_stages():
  files = ["/s/1.png", "/s/new/raw/0/1.png", "/s/old/raw/done.json", "/s/raw/1.png", "/s/given/1"]
  assert stages.folders_in("/s", files, "/s/new") == ["/s/new", "/s/old/raw"]
  assert stages.folders_in("/s", files, "/s") == ["/s/given", "/s/old/raw", "/s/raw"]
  for workdir in ("/", "/s/other", ""):
    assert stages.folders_in("/s", files, workdir) == ["/s/old/raw"]
  # A finished stage, or a folder of the workdir, may itself be the source.
  assert stages.folders_in("/s/old/raw", files[2:3], "/s/old") == []
  assert stages.folders_in("/s/given", files[4:], "/s") == []


def test_files_are_on_the_disk_before_done_says_so(tmp_path, monkeypatch):
  """Otherwise, after a power loss, done.json could exist without the files that it lists."""
  fsync, replace, events = os.fsync, os.replace, []

  def recorded_fsync(file):
    fsync(file)
    events.append(pathlib.Path(os.readlink(f"/proc/self/fd/{file}")).name)

  def recorded_replace(source, target):
    replace(source, target)
    events.append(f"-> {pathlib.Path(target).name}")

  monkeypatch.setattr(os, "fsync", recorded_fsync)
  monkeypatch.setattr(os, "replace", recorded_replace)
  with stages.once(tmp_path, {"n": 1}, files=("*.npy",), varying=("index",)):
    np.save(tmp_path / "a.npy", np.ones(3))
    (tmp_path / "index").write_text("built")
  assert events == ["a.npy", "index", "done.json.partial", "-> done.json"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), np.float32("nan")])
def test_a_stage_whose_numbers_are_not_finite_is_not_finished(tmp_path, value):
  with refused(UserError, "losses.heldout"), stages.once(tmp_path, {"n": 1}) as summary:
    summary.update(steps=3, losses={"train": 1.0, "heldout": value})
  assert not (tmp_path / stages.DONE).exists()


def write_stage(workdir, name="vqgan", content=b"weights"):
  with stages.once(workdir / name, {}, redo=True, files=table.STAGES[name].files):
    (workdir / name / "params.safetensors").write_bytes(content)
    (workdir / name / "config.json").write_text("{}")
  return read_json(workdir / name / stages.DONE)


def test_a_stage_that_writes_the_same_files_has_the_same_id(tmp_path):
  first = write_stage(tmp_path)
  assert list(first["files"]) == ["params.safetensors", "config.json"]
  (tmp_path / "vqgan" / stages.DONE).unlink()
  assert write_stage(tmp_path)["id"] == first["id"]
  assert write_stage(tmp_path / "elsewhere")["id"] == first["id"]
  assert write_stage(tmp_path, content=b"other weights")["id"] != first["id"]


@pytest.mark.parametrize("content", [None, b"weight", b"weighty"])
def test_a_damaged_file_of_a_stage_is_refused_with_what_to_do(tmp_path, content):
  write_stage(tmp_path)
  path = tmp_path / "vqgan" / "params.safetensors"
  stages.check_files(path)
  path.unlink()
  if content is not None:
    path.write_bytes(content)
  for named in (path, tmp_path / "vqgan"):
    with refused(UserError, str(path)):
      stages.check_files(named)
  stages.check_files(tmp_path / "vqgan" / "config.json")
  files = table.STAGES["vqgan"].files
  with refused(UserError, str(path)), stages.once(tmp_path / "vqgan", {}, files=files):
    pytest.fail("the body must not run")


@pytest.mark.parametrize(
  "change",
  [
    lambda done: done.update(id="0123456789abcdef"),
    lambda done: done["files"].popitem(),
    lambda done: done["files"].update(more={"bytes": 1}),
    lambda done: done.update(files=[1]),
    lambda done: done.update(files={"config.json": 1}),
  ],
)
def test_an_id_of_other_files_is_refused(tmp_path, change):
  write_stage(tmp_path)
  path = tmp_path / "vqgan" / stages.DONE
  stages.require(tmp_path, "vqgan")
  done = read_json(path)
  change(done)
  write_json(path, done)
  for read in (
    lambda: stages.require(tmp_path, "vqgan"),
    lambda: stages.check_files(tmp_path / "vqgan" / "params.safetensors"),
    lambda: stages.once(tmp_path / "vqgan", {}).__enter__(),
  ):
    with refused(UserError, str(path.parent)):
      read()


def test_files_that_do_not_count_for_an_id_may_change(tmp_path):
  """ScaNN indexes differ every time they are built."""
  stage, folder = table.STAGES["neighbors"], tmp_path / "neighbors"
  ids = set()
  for content in (b"one", b"two"):
    with stages.once(folder, {}, redo=True, files=stage.files, varying=stage.varying):
      (folder / "index" / "a").mkdir(parents=True, exist_ok=True)
      (folder / "index" / "a" / "scann").write_bytes(content)
      (folder / "words.json").write_text("{}")
    done = stages.require(tmp_path, "neighbors")
    assert list(done["files"]) == ["words.json", "index/a/scann"]
    ids.add(done["id"])
  assert len(ids) == 1
  write_json(folder / stages.DONE, {**done, "id": "0123456789abcdef"})
  with refused(UserError, str(folder)):
    stages.require(tmp_path, "neighbors")


def test_differences_literal():
  assert stages.differences({"a": {"b": 1}}, {}) == ["a: {'b': 1} -> None"]
  assert stages.differences(
    {"a": 1, "b": {"c": 2, "d": 3}}, {"a": 1, "b": {"c": 4, "d": 3}, "e": 5}
  ) == ["b.c: 2 -> 4", "e: None -> 5"]


def test_a_field_that_was_added_since_and_is_off_does_not_differ():
  old = {"a": {"b": 1, "d": 1}}
  assert stages.differences(old, {"a": {"b": 1, "c": 0.0, "d": 1}, "e": ""}) == []
  # But a stored field that is off now does differ.
  assert stages.differences(old, {"a": {"b": 0, "d": 1}}) == ["a.b: 1 -> 0"]


def test_fields_without_effect_do_not_differ():
  """Regression: a finished tokenizer of the package was refused for a weight that it ignores."""
  old = {"vqgan": {"source": "pictures", "l1_weight": 1.0, "batch_size": 8}}
  assert stages.differences(old, {"vqgan": {**old["vqgan"], "l1_weight": 9.0}}) == []
  for change in ({"batch_size": 9}, {"source": "", "l1_weight": 9.0}):
    assert len(stages.differences(old, {"vqgan": {**old["vqgan"], **change}})) == len(change)
  models = [{"model": {"family": "opt", "tied_start": x}} for x in (False, True)]
  assert stages.differences(*models) == []
  models = [{"model": {**x["model"], "family": "modern"}} for x in models]
  assert stages.differences(*models) == ["model.tied_start: False -> True"]
  # A run that is older than vocab.template has the paper's.
  assert stages.differences({"vocab": {}}, {"vocab": {"template": "cm3leon"}}) == []
  assert len(stages.differences({"vocab": {}}, {"vocab": {"template": "chameleon"}})) == 1


def test_of_a_jobs_processes_one_writes_and_all_read_first(tmp_path, capsys):
  read = []

  @contextlib.contextmanager
  def together():
    yield
    read.append((tmp_path / stages.DONE).exists())

  for writes in (False, True):
    with stages.once(tmp_path, {"a": 1}, writes=writes, together=together) as summary:
      summary["steps"] = 5
    assert (tmp_path / stages.DONE).exists() == writes
  with stages.once(tmp_path, {"a": 1}, writes=False) as summary:
    assert summary is None
  assert capsys.readouterr().out == ""
  with stages.once(tmp_path, {"a": 1}, redo=True, writes=False, together=together):
    assert (tmp_path / stages.DONE).exists()
  with stages.once(tmp_path, {"a": 1}, redo=True, together=together):
    assert not (tmp_path / stages.DONE).exists()
  assert read == [False, False, True, True]


@pytest.mark.parametrize(
  ("name", "part", "value", "same"),
  [
    ("raw", "raw.max_rejected", 0.5, True),
    ("raw", "raw.resolution", 64, False),
    ("raw", "raw.options", {"train": 9}, True),
    ("text_tokenizer", "text_tokenizer.max_caption_tokens", 9, True),
    ("documents", "text_tokenizer.max_caption_tokens", 9, False),
    ("vqgan", "vqgan.steps", 9, True),
    ("vqgan", "vqgan.batch_size", 9, False),
    ("vqgan", "seed", 9, False),
    ("clip", "clip.steps", 9, True),
    ("neighbors", "retrieval.lexical_weight", 0.5, False),
    ("train", "train.steps", 9, True),
    ("train", "train.global_batch_size", 9, False),
    ("train", "data.read_threads", 9, True),
    ("train", "data.num_neighbors", 9, False),
    ("train", "model.attention", "plain", True),
    ("train", "optimizer.learning_rate", 9.0, False),
    ("evaluation", "evaluation.num_documents", 9, False),
  ],
)
def test_fields_that_make_another_run(name, part, value, same):
  identity = table.identity(SETTINGS, name)
  assert (table.identity(changed(part, value), name) == identity) == same


def test_a_stage_runs_again_after_a_stage_that_it_reads(tmp_path):
  ran = []

  def run():
    with stages.stage(tmp_path, "vqgan", SETTINGS) as summary:
      ran.append(summary is not None)

  with refused(UserError, str(tmp_path / "raw"), "prepare_data"):
    run()
  finish(tmp_path, "raw")
  run()
  run()
  finish(tmp_path, "raw")
  run()
  assert ran == [True, False, True]
  assert stages.require(tmp_path, "vqgan")["config"]["inputs"] == stages.inputs(
    SETTINGS, tmp_path, "vqgan"
  )


def test_a_stage_of_another_config_is_refused(tmp_path):
  with stages.stage(tmp_path, "raw", SETTINGS):
    pass
  other = changed("raw.resolution", 64)
  with refused(UserError, "raw.resolution", "64"), stages.stage(tmp_path, "raw", other):
    pytest.fail("the body must not run")


def test_a_training_of_another_model_is_refused(tmp_path):
  finish(tmp_path, "text_tokenizer", "vqgan", "train")
  assert set(stages.inputs(SETTINGS, tmp_path, "export")) == {"text_tokenizer", "vqgan", "train"}
  stages.inputs(changed("model.attention", "plain"), tmp_path, "export")
  stages.inputs(changed("optimizer.learning_rate", 9.0), tmp_path, "export")
  with refused(UserError, "model.width", "1024"):
    stages.inputs(changed("model.width", 1_024), tmp_path, "export")

import os

from etils import epath
import pytest

from cm3leon_jax.commands import config_file, sharded
from cm3leon_jax.config.settings import settings_from_config
from cm3leon_jax.errors import UserError
from cm3leon_jax.files.json_files import write_json
from cm3leon_jax.stages import stages
from cm3leon_jax.training.faults import lease
from tests.launched import SCENES, launch
from tests.refusals import refused


def settings_of(config):
  return settings_from_config(config_file.load(config))


@pytest.mark.parametrize(
  ("name", "folder", "config", "more"),
  [
    ("prepare_data", "raw", SCENES, {"files": "before"}),
    pytest.param("encode_documents", "documents", SCENES, {}, marks=pytest.mark.slow),
    pytest.param("build_neighbors", "neighbors", SCENES, {}, marks=pytest.mark.slow),
    ("encode_instructions", "instructions", "sft_350m", {"tasks": "before"}),
  ],
)
def test_a_second_job_of_a_stage_is_refused_and_leaves_its_folder_as_it_is(
  tmp_path, monkeypatch, name, folder, config, more
):
  """Keeps the stage's done.json, even though the inputs of the stage have changed."""
  read = {"raw", "text_tokenizer", "vqgan", "clip"} - {folder}
  for stage in read:
    write_json(tmp_path / stage / stages.DONE, {"id": "before"})
  result = {"config": stages.run_config(settings_of(config), tmp_path, folder, more), "id": "a"}
  done = tmp_path / folder / stages.DONE
  write_json(done, result)
  before = done.read_bytes()
  for stage in read:
    write_json(tmp_path / stage / stages.DONE, {"id": "after"})
  monkeypatch.setattr(lease, "BEAT_SECONDS", 0.1)
  with lease.Lease(tmp_path / folder):
    result = launch(name, f"--config={config}", f"--workdir={tmp_path}", timeout=100)
    left = {path.name.removesuffix(".partial") for path in (tmp_path / folder).iterdir()}
  assert result.returncode == 2, result.stderr
  assert result.stderr.startswith(f"error: process {os.getpid()} on ")
  assert result.stderr.endswith(
    f" works in {tmp_path / folder}: use another --workdir, or stop that job.\n"
  )
  assert left == {lease.NAME, stages.DONE}
  assert done.read_bytes() == before


def test_the_lease_is_given_back_after_the_stage_is_finished(tmp_path, monkeypatch):
  write, events = stages.write_json, []
  folder = epath.Path(tmp_path / "raw")

  def recorded(path, value):
    events.append((path.name, (folder / lease.NAME).exists()))
    write(path, value)

  monkeypatch.setattr(stages, "write_json", recorded)
  settings = settings_of(SCENES)
  with sharded.stage(folder.parent, "raw", settings) as summary:
    assert summary == {}
  assert events == [(stages.DONE, True)]
  assert not (folder / lease.NAME).exists()
  with sharded.stage(folder.parent, "raw", settings) as summary:
    assert summary is None
  assert not (folder / lease.NAME).exists()


def test_a_job_that_lost_its_lease_finishes_no_stage(tmp_path):
  folder = epath.Path(tmp_path / "raw")
  with (
    refused(UserError, "lease.json"),
    sharded.stage(folder.parent, "raw", settings_of(SCENES)),
  ):
    write_json(folder / lease.NAME, {"token": "other", "host": "elsewhere", "pid": 7})
  assert not (folder / stages.DONE).exists()

import os
import shutil
import signal

from etils import epath
import pytest

from cm3leon_jax.commands import train
from cm3leon_jax.config.settings import settings_from_config
from cm3leon_jax.errors import INTERRUPTED
from cm3leon_jax.files.json_files import read_json, read_json_lines
from cm3leon_jax.stages import stages
from tests.launch import tiny_instruct_config
from tests.launch.several_processes_test import (
  TOLERANCE,
  finish,
  one_process,
  pids,
  start,
  wait_for_steps,
)
from tests.launch.stages_before import make_workdir

NAMES = ("answers", "edits", "pairs", "texts")


def tuned(workdir, init_from="", replay_share=0.4, **fields):
  config = tiny_instruct_config.get_config()
  config.instructions.replay_share = replay_share
  config.update(fields)
  config.mesh.update({"data": 2, "fsdp": 2, "tensor": 2})
  train.main(
    settings_from_config(config), epath.Path(workdir), train.Flags(init_from=str(init_from))
  )


def log_of(workdir):
  return read_json_lines(workdir / "train" / "metrics" / "metrics.jsonl")


def by_source(workdir) -> dict[tuple[int, str], float]:
  """Returns (step, name of a loss) -> loss, for all losses of single sources."""
  return {(x["step"], name): x[name] for x in log_of(workdir) for name in x if "/" in name}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
  """Trains a run that a tuning starts from, and makes the inputs of that tuning."""
  folder = tmp_path_factory.mktemp("pretrained")
  make_workdir(folder, settings_from_config(tiny_instruct_config.get_config()))
  one_process(folder, train={"steps": 4, "sample_every": 100})
  return folder


def copy_of(pretrained, folder):
  for name in ("documents", "instructions", "neighbors", "text_tokenizer", "vqgan"):
    shutil.copytree(pretrained / name, folder / name, symlinks=True)
  return folder


@pytest.fixture(scope="module")
def whole(pretrained, tmp_path_factory):
  folder = copy_of(pretrained, tmp_path_factory.mktemp("whole"))
  tuned(folder, pretrained)
  return folder


@pytest.mark.slow
def test_a_tuning_reports_the_losses_before_and_after_of_tasks_and_documents(
  pretrained, tmp_path, capsys
):
  folder = copy_of(pretrained, tmp_path)
  tuned(folder, pretrained, train={"steps": 2})
  output = capsys.readouterr().out
  summary = read_json(folder / "train" / stages.DONE)["summary"]
  before = summary["heldout_before"]
  assert {f"heldout_loss/{name}" for name in NAMES} < before.keys() < summary.keys()
  changes = [f"{before[key]:.3f} -> {summary[key]:.3f}" for key in before if "/" in key]
  shown = ", ".join(f"{name} {change}" for name, change in zip(NAMES, changes))
  assert f"train: held-out loss before -> after: {shown} nats per target\n" in output
  trained = read_json(pretrained / "train" / stages.DONE)["summary"]
  assert "heldout_before" not in trained
  # Other rows, but of the same documents.
  assert before["heldout_loss/pairs"] == pytest.approx(trained["heldout_loss"], rel=0.3)


@pytest.mark.slow
def test_without_documents_a_tuning_reports_its_tasks(pretrained, tmp_path, capsys):
  folder = copy_of(pretrained, tmp_path)
  for name in ("documents", "neighbors"):
    shutil.rmtree(folder / name)
  tuned(folder, pretrained, replay_share=0.0, train={"steps": 1})
  line = capsys.readouterr().out.splitlines()[-1]
  assert line.startswith("train: held-out loss before -> after: answers ")
  assert ", edits " in line
  assert "pairs" not in line
  assert not (folder / "train" / "samples").exists()


@pytest.mark.slow
def test_one_process_continues_a_tuning_of_two_that_sigterm_stopped(whole, pretrained, tmp_path):
  """The losses of each source equal those of one process that is never stopped."""
  folder = copy_of(pretrained, tmp_path)
  flags = [f"--init_from={pretrained}", "--config.train.checkpoint_every=1"]
  job = start(folder, 2, *flags, config="tiny_instruct_config")
  last = pids(job, 2)[-1]
  wait_for_steps(folder, 3)
  os.kill(last, signal.SIGTERM)
  output = finish(job, INTERRUPTED)
  assert output.count("step 0/12 | held-out by source: answers ") == 1
  stopped = max(line["step"] for line in log_of(folder))
  assert 3 <= stopped < 12
  finish(start(folder, 1, config="tiny_instruct_config"))
  found, expected = by_source(folder), by_source(whole)
  planned = {key for key in found if key[1].startswith("loss/")}
  assert planned == {key for key in expected if key[1].startswith("loss/")}
  assert {name for step, name in found if step == 0} == {f"heldout_loss/{n}" for n in NAMES}
  for key in found.keys() & expected.keys():
    assert found[key] == pytest.approx(expected[key], abs=TOLERANCE), key
  steps = [line["step"] for line in log_of(folder) if "heldout_loss" in line]
  assert steps.count(0) == 1
  at_start, other = (
    read_json(x / "train" / stages.DONE)["summary"]["heldout_before"] for x in (folder, whole)
  )
  assert at_start == pytest.approx(other, abs=TOLERANCE)

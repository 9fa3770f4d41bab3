"""Tests that launch.train in several processes, with 8 devices in all, equals one process."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

from etils import epath
import pytest

from cm3leon_jax.commands import train
from cm3leon_jax.config.settings import settings_from_config
from cm3leon_jax.errors import INTERRUPTED, UserError
from cm3leon_jax.files.json_files import read_json, read_json_lines
from cm3leon_jax.stages import stages
from tests.launch.stages_before import make_workdir
from tests.launch.tiny_config import get_config
from tests.refusals import check_refused

ROOT = pathlib.Path(__file__).parents[2]
LOCAL = ROOT / "launch" / "pod" / "local.sh"
TOLERANCE = 1e-5
SAMPLES = ["step_000004.png", "step_000008.png", "step_000012.png"]


def start(workdir, processes, *flags, mesh=(2, 2, 2), config="tiny_config") -> subprocess.Popen:
  shape = [f"--config.mesh.{axis}={size}" for axis, size in zip(("data", "fsdp", "tensor"), mesh)]
  command = ["bash", LOCAL, str(processes), str(8 // processes), "--"]
  flags = [f"--config=tests/launch/{config}.py", f"--workdir={workdir}", *shape, *flags]
  env = {**os.environ, "PYTHON": sys.executable}
  output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
  return subprocess.Popen([*command, *flags], cwd=ROOT, env=env, **output)


def finish(job, code=0) -> str:
  output = job.communicate(timeout=300)[0]
  assert job.returncode == code, output
  return output


def losses(workdir) -> dict[int, float]:
  lines = read_json_lines(workdir / "train" / "metrics" / "metrics.jsonl")
  lines = [line for line in lines if "loss" in line]
  assert len({line["step"] for line in lines}) == len(lines)  # Only one process logs.
  return {line["step"]: line["loss"] for line in lines}


def largest_difference(workdir, other) -> float:
  found, expected = losses(workdir), losses(other)
  assert found.keys() == expected.keys()
  return max(abs(found[step] - expected[step]) for step in expected)


def assert_same_samples(workdir, other) -> None:
  for name in SAMPLES:
    grids = [folder / "train" / "samples" / name for folder in (workdir, other)]
    assert grids[0].read_bytes() == grids[1].read_bytes()


def pids(job, processes) -> list[int]:
  return [int(job.stdout.readline().rpartition(" ")[2]) for _ in range(processes)]


def wait_for_steps(workdir, count) -> None:
  for _ in range(1_000):
    if len(losses(workdir)) >= count:
      return
    time.sleep(0.1)
  raise AssertionError("no step was logged")


def one_process(workdir, init_from="", **fields):
  config = get_config()
  config.update(fields)
  config.mesh.update({"data": 2, "fsdp": 2, "tensor": 2})
  train.main(settings_from_config(config), epath.Path(workdir), train.Flags(init_from=init_from))


@pytest.fixture
def fresh(tmp_path):
  make_workdir(tmp_path, settings_from_config(get_config()))
  return tmp_path


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  folder = tmp_path_factory.mktemp("whole")
  make_workdir(folder, settings_from_config(get_config()))
  one_process(folder)
  return folder


@pytest.mark.slow
def test_one_process_continues_a_run_of_two_that_sigterm_stopped(whole, fresh):
  """Losses and images equal those of one process that is never stopped."""
  job = start(fresh, 2, "--config.train.checkpoint_every=1")
  second = pids(job, 2)[1]
  wait_for_steps(fresh, 4)
  os.kill(second, signal.SIGTERM)
  output = finish(job, INTERRUPTED)
  assert output.count("stopped at step ") == 1
  assert output.count("rows: 64 samples") == 1
  stopped = max(losses(fresh))
  assert 4 <= stopped < 12
  digests = fresh / "train" / "checkpoints.digests"
  assert {path.name for path in digests.iterdir()} == {f"{stopped - 1}.json", f"{stopped}.json"}
  names = [n for n in read_json(digests / f"{stopped}.json") if "ocdbt.process" in n]
  assert {name.split("/")[1] for name in names} == {"ocdbt.process_0", "ocdbt.process_1"}
  state = fresh / "train" / "checkpoints" / str(stopped) / "state"
  parts = [state.glob(f"ocdbt.process_{i}/**/*") for i in range(2)]
  sizes = [sum(path.stat().st_size for path in part if path.is_file()) for part in parts]
  assert 2 * min(sizes) > max(sizes)  # The two replicas share a save; process 0 writes scalars.
  assert not (fresh / "train" / stages.DONE).exists()
  one_process(fresh)
  assert largest_difference(fresh, whole) < TOLERANCE
  found, expected = losses(fresh), losses(whole)
  # Negative control: the loss of the next step.
  assert min(abs(found[step] - expected[step + 1]) for step in range(1, 12)) > TOLERANCE
  assert (fresh / "train" / stages.DONE).exists()
  assert_same_samples(fresh, whole)


@pytest.mark.slow
def test_a_run_starts_from_another_and_continues_without_it(whole, fresh, capsys):
  """The first loss is near the source's last loss, even with other tokenizers."""
  source = fresh / "source"
  shutil.copytree(whole / "train", source / "train")
  one_process(fresh, str(source), train={"steps": 1, "eval_batches": 1, "sample_every": 9})
  assert losses(fresh)[1] < losses(whole)[1] - 0.2
  shutil.rmtree(source)
  one_process(fresh, str(source), train={"steps": 1})
  assert "finished already, skipped" in capsys.readouterr().out
  stored = read_json(fresh / "train" / "config.json")["run"]["init_from"]
  assert (stored["source"], stored["step"]) == (str(source), 12)
  with pytest.raises(UserError, match=r"--init_from is elsewhere, but the run in .* leave"):
    one_process(fresh, "elsewhere")


@pytest.mark.slow
@pytest.mark.parametrize(
  ("processes", "mesh"), [(1, (1, 4, 2)), (2, (1, 8, 1)), (4, (2, 2, 2)), (4, (1, 4, 2))]
)
def test_any_number_of_processes_and_any_mesh_give_the_same_losses(whole, fresh, processes, mesh):
  finish(start(fresh, processes, mesh=mesh))
  assert largest_difference(fresh, whole) < TOLERANCE
  assert_same_samples(fresh, whole)


@pytest.mark.slow
def test_two_processes_continue_a_run_of_four_that_sigterm_stopped(whole, fresh):
  job = start(fresh, 4, "--config.train.checkpoint_every=1")
  third = pids(job, 4)[2]
  wait_for_steps(fresh, 2)
  os.kill(third, signal.SIGTERM)
  finish(job, INTERRUPTED)
  assert max(losses(fresh)) < 12
  finish(start(fresh, 2))
  assert largest_difference(fresh, whole) < TOLERANCE


@pytest.mark.slow
def test_a_process_that_is_killed_takes_the_others_with_it(fresh):
  job = start(fresh, 2, "--config.train.checkpoint_every=1")
  second = pids(job, 2)[1]
  wait_for_steps(fresh, 3)
  os.kill(second, signal.SIGKILL)
  assert "local.sh: process 1 ended with exit code 137." in finish(job, 137)
  finish(start(fresh, 4))  # Continues from the last sealed checkpoint.
  assert sorted(losses(fresh)) == list(range(1, 13))


@pytest.mark.slow
def test_all_processes_report_a_flipped_bit(fresh):
  finish(start(fresh, 2, "--config.train.steps=4"))
  files = [path for path in (fresh / "train" / "checkpoints" / "4").rglob("*") if path.is_file()]
  largest = max(files, key=lambda path: path.stat().st_size)
  content = bytearray(largest.read_bytes())
  content[len(content) // 2] ^= 1
  largest.write_bytes(content)
  output = finish(start(fresh, 2), 2)
  sentence = (
    f"error: all checkpoints in {fresh}/train/checkpoints are damaged ({largest} is damaged: it is "
    "not what was written): restore one of them"
  )
  for process in range(2):
    assert f"[{process}] {sentence}" in output


@pytest.mark.parametrize("arguments", [[], ["2", "0", "--"], ["2", "4", "--config=x"]])
def test_the_script_refuses_bad_arguments_in_one_sentence(arguments):
  command = ["bash", LOCAL, *arguments]
  check_refused(subprocess.run(command, capture_output=True, text=True, timeout=60, check=False))

"""Tests which checkpoint a run goes back to, and that its processes agree on it."""

import os
import shutil
import subprocess
import sys
from unittest import mock

from etils import epath
import jax
import pytest

from cm3leon_jax.errors import TryAgain, UserError
from cm3leon_jax.weights import checkpoint, recovery, sealing
from tests.distributed_test import free_port
from tests.models.tiny import mesh_of
from tests.refusals import refused
from tests.weights.saved import flip, fresh, largest_file, on_disk

# Program that saves steps 1 to 5, damages the digests of 5, removes those of 4, and adds digests of
# 7. Then it goes back to the newest intact checkpoint, and then to step 2.
PROCESS = """
import pathlib, sys
import numpy as np
from cm3leon_jax import distributed
from cm3leon_jax.weights import recovery
from cm3leon_jax.weights.checkpoint import Checkpoints
folder = pathlib.Path(sys.argv[3])
# Libraries write to the process's standard output at any time, in the middle of a line, too.
sys.stdout = open(sys.argv[4], "w", encoding="utf-8")
distributed.initialize(sys.argv[1], 2, int(sys.argv[2]), 60)
digests = folder / "checkpoints.digests"
with Checkpoints(folder, keep=9) as checkpoints:
  for step in range(1, 6):
    checkpoints.save({"w": np.full(1_000, step, np.float32)}, step, next_row=step)
  checkpoints.wait()
  with distributed.together():
    if distributed.is_first():
      (digests / "5.json").write_text('{"a": "b"}')
      (digests / "4.json").unlink()
      (digests / "7.json").write_text("{}")
  found = [recovery.newest_whole(checkpoints)]
  recovery.discard_unsealed(checkpoints)
  found.append(checkpoints.steps())
  distributed.print_once(sorted(path.stem for path in digests.iterdir()))
  recovery.check_target(checkpoints, 2)
  checkpoints.delete_after(2)
  found += [checkpoints.steps(), recovery.newest_whole(checkpoints)]
  print(found)
"""


@pytest.mark.slow
def test_two_processes_go_back_together(tmp_path):
  address, jobs = f"localhost:{free_port()}", []
  folder, printed = tmp_path / "run", [tmp_path / "first", tmp_path / "second"]
  for i in range(2):
    command = [sys.executable, "-c", PROCESS, address, str(i), str(folder), str(printed[i])]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    jobs.append(subprocess.Popen(command, env=dict(os.environ), **pipes))
  found = [job.communicate(timeout=300) for job in jobs]
  assert [job.returncode for job in jobs] == [0, 0], found
  first, second = (path.read_text("utf-8").splitlines() for path in printed)
  assert first[-1] == second[-1] == "[3, [1, 2, 3], [1, 2], 2]"
  lines = (
    "warning: checkpoint 7 is gone from ",
    f"warning: {folder}/checkpoints/5/",
    "warning: checkpoint 4 in ",
    "['1', '2', '3', '7']",
  )
  assert len(first) == len(lines) + 1
  for line, start in zip(first, lines):
    assert line.startswith(start)
  assert len(second) == 1
  names = {path.name for path in (folder / "checkpoints.digests").iterdir()}
  assert names == {"1.json", "2.json"}


def test_a_save_that_was_not_finished_does_not_count_and_is_deleted_with_a_warning(saved, capsys):
  (saved / "checkpoints.digests" / "2.json").unlink()
  with jax.set_mesh(mesh_of(1, 1, 1)), checkpoint.Checkpoints(saved, keep=2) as checkpoints:
    assert checkpoints.newest() == recovery.newest_whole(checkpoints) == 1
    recovery.discard_unsealed(checkpoints)
    assert on_disk(saved) == [[1], [1]]
    assert "warning: checkpoint 2 in" in capsys.readouterr().out
    checkpoints.save(fresh(3), 2, next_row=99)  # Writes a checkpoint of the same step again.
    checkpoints.wait()
    assert checkpoints.newest() == 2


def test_a_newer_checkpoint_that_is_gone_is_named(saved, capsys):
  shutil.rmtree(saved / "checkpoints" / "2")
  with checkpoint.Checkpoints(saved, keep=2) as checkpoints:
    assert recovery.newest_whole(checkpoints) == 1
  assert "warning: checkpoint 2 is gone from" in capsys.readouterr().out


def test_a_first_save_that_was_killed_before_its_digests_gets_them(saved, capsys):
  expected = (saved / "checkpoints.digests" / "1.json").read_bytes()
  shutil.rmtree(saved / "checkpoints" / "2")
  for path in (saved / "checkpoints.digests").iterdir():
    path.unlink()
  # Digests from a second process of the killed job; the new job has one process.
  (saved / "checkpoints.digests" / "1.part1").write_text('{"other": "digest"}')
  with checkpoint.Checkpoints(saved, keep=2) as checkpoints:
    recovery.discard_unsealed(checkpoints)
    assert recovery.newest_whole(checkpoints) == 1
  assert [path.name for path in (saved / "checkpoints.digests").iterdir()] == ["1.json"]
  assert (saved / "checkpoints.digests" / "1.json").read_bytes() == expected
  assert "warning: checkpoint 1 in" in capsys.readouterr().out


@pytest.mark.parametrize("digests", [None, b"", b"[]"])
def test_a_run_goes_back_to_the_newest_whole_checkpoint(saved, capsys, digests):
  """Given `digests`, damages the digests of checkpoint 2; given None, damages one of its files."""
  if digests is None:
    flip(largest_file(saved / "checkpoints" / "2"))
  else:
    (saved / "checkpoints.digests" / "2.json").write_bytes(digests)
  checkpoints = checkpoint.Checkpoints(saved, keep=2)
  assert checkpoints.newest() == 2
  assert recovery.newest_whole(checkpoints) == 1
  [warning] = capsys.readouterr().out.splitlines()
  assert "is damaged" in warning
  assert warning.endswith("; the run goes back to checkpoint 1.")
  assert on_disk(saved) == [[1], [1]]
  with jax.set_mesh(mesh_of(1, 1, 1)):
    checkpoints.save(fresh(3), 2, next_row=99)  # Writes a checkpoint of the same step again.
    checkpoints.wait()
  assert recovery.newest_whole(checkpoints) == 2
  checkpoints.close()


def test_a_step_to_go_back_to_leaves_no_digests_after_it(saved):
  """Removes the digests of later steps, even of a step that has no checkpoint."""
  shutil.copy(saved / "checkpoints.digests" / "2.json", saved / "checkpoints.digests" / "3.json")
  with checkpoint.Checkpoints(saved, keep=2) as checkpoints:
    recovery.check_target(checkpoints, 1)
    checkpoints.delete_after(1)
  assert on_disk(saved) == [[1], [1]]


def test_a_step_to_go_back_to_must_be_sealed(saved):
  (saved / "checkpoints.digests" / "1.json").unlink()
  with checkpoint.Checkpoints(saved, keep=2) as checkpoints:
    for step in (1, 9):
      with refused(UserError, f"step {step}", "2"):
        recovery.check_target(checkpoints, step)
  assert on_disk(saved) == [[1, 2], [2]]


def test_damaged_checkpoints_alone_are_refused_and_kept(saved):
  for step in ("1", "2"):
    flip(largest_file(saved / "checkpoints" / step))
  damaged = refused(UserError, "all checkpoints", "damaged")
  with damaged, checkpoint.Checkpoints(saved, keep=2) as checkpoints:
    recovery.newest_whole(checkpoints)
  assert on_disk(saved) == [[1, 2]] * 2


def test_checkpoints_without_digests_are_kept_and_refused(saved):
  shutil.rmtree(saved / "checkpoints.digests")
  absent = refused(UserError, "checkpoints.digests")
  with absent, checkpoint.Checkpoints(saved, keep=2) as checkpoints:
    recovery.discard_unsealed(checkpoints)
  assert sorted(p.name for p in (saved / "checkpoints").iterdir()) == ["1", "2"]


def test_a_checkpoint_in_a_bucket_that_does_not_answer_is_no_damaged_one(saved, monkeypatch):
  """No checkpoint is deleted, because neither gcsfs nor disk errors prove that it is damaged."""
  aiohttp = pytest.importorskip("aiohttp")
  checkpoints = checkpoint.Checkpoints(saved, 2)
  steps = checkpoints.sealed()
  for error in (aiohttp.SocketTimeoutError("gone"), OSError("of a disk")):
    monkeypatch.setattr(sealing, "digest", mock.Mock(side_effect=error))
    with refused(TryAgain, "nothing was deleted"):
      recovery.newest_whole(checkpoints)
    assert checkpoints.sealed() == steps != []
  checkpoints.close()


def test_digests_in_a_bucket_that_does_not_answer_are_not_damaged(saved, monkeypatch):
  """The fake raises an error like those of gcsfs; its message contains the word "invalid"."""
  path_type = type(epath.Path(saved))
  read = path_type.read_text

  def read_text(path, *args, **options):
    if path.name == "2.json":
      raise ValueError("Bad Request: b/bucket/o\ninvalid token, try again")
    return read(path, *args, **options)

  with jax.set_mesh(mesh_of(1, 1, 1)):
    checkpoints = checkpoint.Checkpoints(saved, keep=2)
    monkeypatch.setattr(path_type, "read_text", read_text)
    with refused(TryAgain, str(saved), "invalid token"), checkpoints:
      recovery.newest_whole(checkpoints)
  assert (saved / "checkpoints" / "2").exists()

import dataclasses
import shutil
import threading
import time
from unittest import mock

import jax
import numpy as np
import pytest

from cm3leon_jax.errors import TryAgain, UserError
from cm3leon_jax.stages import stages
from cm3leon_jax.training.step.state import init_state
from cm3leon_jax.weights import checkpoint, reading, recovery
from tests.launched import python
from tests.models.tiny import CONFIG, mesh_of
from tests.refusals import refused
from tests.weights.saved import OPTIMIZER, fresh, on_disk


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_restore_is_bit_equal_on_any_mesh(saved, shape):
  with jax.set_mesh(mesh_of(1, 1, 1)):
    expected, other = jax.device_get(fresh(2)), jax.device_get(fresh(1))
  with jax.set_mesh(mesh_of(*shape)):
    checkpoints = checkpoint.Checkpoints(saved, keep=2)
    abstract = jax.eval_shape(lambda: init_state(CONFIG, OPTIMIZER, jax.random.key(0)))
    state, next_row = checkpoints.restore(abstract, checkpoints.newest())
    assert next_row == 16
    for found, x, y in zip(
      jax.tree.leaves(state), jax.tree.leaves(expected), jax.tree.leaves(abstract)
    ):
      np.testing.assert_array_equal(found, x)
      assert found.sharding.spec == jax.typeof(y).sharding.spec
    assert not np.array_equal(state.params["embed"], other.params["embed"])
    checkpoints.close()


def test_parameters_alone_are_the_average_of_a_run_that_has_one(tmp_path):
  with jax.set_mesh(mesh_of(1, 1, 1)):
    state, average = fresh(1), fresh(2).params
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=1)
    checkpoints.save(dataclasses.replace(state, ema=average), 3, next_row=0)
    checkpoints.close()
  with jax.set_mesh(mesh_of(2, 2, 2)):
    params, _ = reading.load_params(tmp_path, CONFIG)
    last, _ = reading.load_params(tmp_path, CONFIG, average=False)
  jax.tree.map(np.testing.assert_array_equal, params, average)
  jax.tree.map(np.testing.assert_array_equal, last, state.params)
  assert not np.array_equal(params["embed"], state.params["embed"])


def test_a_run_without_an_average_has_nothing_to_compare(saved):
  with jax.set_mesh(mesh_of(1, 1, 1)), refused(UserError, "average"):
    reading.load_params(saved, CONFIG, average=False)


@pytest.mark.parametrize("damage", ["missing", "changed", "surplus"])
def test_a_damaged_file_is_refused(saved, damage):
  files = [path for path in (saved / "checkpoints" / "2").rglob("*") if path.is_file()]
  victim = min(path for path in files if path.stat().st_size > 100)
  data = victim.read_bytes()
  victim.unlink()
  if damage == "surplus":
    victim.write_bytes(data)
    victim = victim.with_name("surplus")
  if damage != "missing":
    victim.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
  with jax.set_mesh(mesh_of(1, 1, 1)), refused(UserError, str(victim), "rollback", "--step=1"):
    reading.load_params(saved, CONFIG)


@pytest.mark.parametrize("reader", ["check", "restore_params"])
def test_a_checkpoint_that_a_training_deletes_is_chosen_again(saved, monkeypatch, reader):
  """Before each read, the training saves another checkpoint and deletes the chosen one."""
  original, saves = getattr(checkpoint.Checkpoints, reader), 2

  def read_late(self, *args):
    step, folders = self.sealed()[-1], (self.folder, self.digest_folder)
    if step < 2 + saves:
      for folder in folders:
        for path in [*folder.glob(str(step)), *folder.glob(f"{step}.json")]:
          path.rename(folder / path.name.replace(str(step), str(step + 1)))
    return original(self, *args)

  monkeypatch.setattr(checkpoint.Checkpoints, reader, read_late)
  with jax.set_mesh(mesh_of(1, 1, 1)):
    params, step = reading.load_params(saved, CONFIG)
    assert step == 2 + saves
    np.testing.assert_array_equal(params["embed"], fresh(2).params["embed"])
    saves = reading.TRIES + 10
    with pytest.raises(Exception, match="damaged" if reader == "check" else "does not exist at"):
      reading.load_params(saved, CONFIG)
    assert reading.stages.newest_step(saved) == 4 + reading.TRIES


def test_digests_of_a_deleted_checkpoint_do_not_count_for_the_next_of_its_step(saved):
  shutil.rmtree(saved / "checkpoints" / "2")
  with jax.set_mesh(mesh_of(1, 1, 1)), checkpoint.Checkpoints(saved, keep=2) as checkpoints:
    checkpoints.save(fresh(3), 2, next_row=99)
    assert checkpoints.newest() == 1
    checkpoints.wait()
    assert checkpoints.newest() == 2


def small(step):
  return {"w": np.full(4, step, np.float32)}


def test_checkpoints_are_kept_for_three_reasons_also_by_the_next_start(tmp_path):
  """Keeps the 2 newest, multiples of 3, and the 2 with the lowest loss; replaces step 4 later."""
  losses = [5.0, 1.0, 9.0, 2.0, 7.0, 6.0, 1.5, float("nan"), 4.0, 8.0]
  for starts in (range(1, 6), range(6, 11)):
    with checkpoint.Checkpoints(tmp_path, 2, keep_every=3, keep_best=2) as checkpoints:
      for step in starts:
        checkpoints.save(small(step), step, next_row=step, heldout_loss=losses[step - 1])
  assert on_disk(tmp_path) == [[2, 3, 6, 7, 9, 10]] * 2


def test_a_save_in_flight_is_finished_when_an_error_ends_the_run(tmp_path):
  with refused(ZeroDivisionError), checkpoint.Checkpoints(tmp_path, 2) as checkpoints:
    checkpoints.save(small(1), 1, next_row=1)
    raise ZeroDivisionError
  assert on_disk(tmp_path) == [[1], [1]]


# Program that saves 4 kB and then 40 MB. Its files are limited to 1 MB, as on a full disk.
FULL_DISK = """
import resource, time
import jax.numpy as jnp
from cm3leon_jax.commands import common
from cm3leon_jax.weights.checkpoint import Checkpoints
def main(workdir):
  with Checkpoints(workdir, 2) as checkpoints:
    checkpoints.save({"w": jnp.ones(1_000)}, 1, 1)
    checkpoints.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, resource.RLIM_INFINITY))
    arrays = {f"w{i}": jnp.sin(jnp.arange(1_000_000.0)) for i in range(10)}
    checkpoints.save(arrays, 2, 2)
    for _ in range(1_000):  # Steps.
      checkpoints.check_save()
      time.sleep(0.05)
common.run(main, config=False)
"""


def test_a_save_that_fails_is_reported_in_the_loop_and_leaves_the_one_before(tmp_path):
  result = python(FULL_DISK, f"--workdir={tmp_path}")
  assert result.returncode == TryAgain.exit_code
  [line] = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
  assert line.startswith(f"error: checkpoint 2 could not be written to {tmp_path}/checkpoints (")
  assert line.endswith("): the same command continues from checkpoint 1.")
  with checkpoint.Checkpoints(tmp_path, 2) as checkpoints:
    assert recovery.newest_whole(checkpoints) == 1


@pytest.mark.parametrize("saves", [0, 2])
def test_a_bucket_that_fails_ends_the_run_with_the_checkpoint_that_is_whole(tmp_path, saves):
  """Given a bucket that fails between two steps, the run first finishes the save in progress."""
  gone = RuntimeError("All 32 retry attempts failed: status 503")
  sentence = refused(TryAgain, str(tmp_path), "same command continues")
  with sentence, checkpoint.Checkpoints(tmp_path, 2) as checkpoints:
    for step in range(1, saves + 1):
      checkpoints.save(small(step), step, next_row=step)
    raise UserError("a file is damaged") from gone
  assert stages.newest_step(tmp_path) == saves


def test_a_job_that_lost_its_lease_neither_saves_nor_seals(tmp_path):
  lost = UserError("another job took the lease")
  # The job loses the lease after its first save begins and before that checkpoint is sealed.
  check = mock.Mock(side_effect=[None, lost, lost])
  checkpoints = checkpoint.Checkpoints(tmp_path, 2, check=check)
  checkpoints.save(small(1), 1, next_row=1)
  with pytest.raises(UserError, match="another job"):
    checkpoints.wait()
  with pytest.raises(UserError, match="another job"):
    checkpoints.save(small(2), 2, next_row=2)
  checkpoints.close()
  assert not (tmp_path / "checkpoints.digests" / "1.json").exists()
  assert not (tmp_path / "checkpoints" / "2").exists()
  assert check.call_count == 3


def test_the_step_loop_is_not_stopped_by_digests(tmp_path, monkeypatch):
  """The loop continues while digests are computed, even if they take long."""
  release = threading.Event()

  def slow(folder):
    assert release.wait(60)
    return {"file": "digest"}

  monkeypatch.setattr(checkpoint.sealing, "digests", slow)
  with checkpoint.Checkpoints(tmp_path, 2) as checkpoints:
    checkpoints.save(small(1), 1, next_row=1)
    while not (tmp_path / "checkpoints" / "1").exists():
      time.sleep(0.01)
    for _ in range(10):
      checkpoints.check_save()
    assert checkpoints.newest() is None
    release.set()
    checkpoints.wait()
    assert checkpoints.newest() == 1

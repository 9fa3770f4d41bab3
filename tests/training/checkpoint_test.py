import dataclasses
import shutil
import subprocess
import sys
import threading
import time
from unittest import mock

from etils import epath
import jax
import numpy as np
import pytest

from cm3leon_jax.config import TryAgain, UserError
from cm3leon_jax.training import checkpoint, recovery, sealing
from cm3leon_jax.training.optimizer import OptimizerConfig, create_optimizer
from cm3leon_jax.training.state import init_state
from tests.models.tiny import CONFIG, mesh_of

OPTIMIZER = create_optimizer(OptimizerConfig(), 10)
INIT = jax.jit(lambda key: init_state(CONFIG, OPTIMIZER, key))


def fresh(seed):
  return INIT(jax.random.key(seed))


@pytest.fixture(scope="module")
def original(tmp_path_factory):
  """Two checkpoints made on a (1, 1, 1) mesh, of the states of seeds 1 and 2."""
  folder = tmp_path_factory.mktemp("original")
  with jax.set_mesh(mesh_of(1, 1, 1)):
    checkpoints = checkpoint.Checkpoints(folder, keep=2)
    for step in (1, 2):
      checkpoints.save(fresh(step), step, next_row=8 * step)
    checkpoints.close()
  return folder


@pytest.fixture
def saved(original, tmp_path):
  """A copy of them, for the test to damage."""
  return shutil.copytree(original, tmp_path / "saved")


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2), (1, 4, 2)])
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


def test_parameters_alone_are_those_of_the_state(saved):
  with jax.set_mesh(mesh_of(1, 2, 2)):
    params, step = checkpoint.load_params(saved, CONFIG)
    assert step == 2
  with jax.set_mesh(mesh_of(1, 1, 1)):
    for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(fresh(2).params)):
      np.testing.assert_array_equal(x, y)


def test_parameters_alone_are_the_average_of_a_run_that_has_one(tmp_path):
  with jax.set_mesh(mesh_of(1, 1, 1)):
    state, average = fresh(1), fresh(2).params
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=1)
    checkpoints.save(dataclasses.replace(state, ema=average), 3, next_row=0)
    checkpoints.close()
  with jax.set_mesh(mesh_of(2, 2, 2)):
    params, _ = checkpoint.load_params(tmp_path, CONFIG)
    last, _ = checkpoint.load_params(tmp_path, CONFIG, average=False)
  jax.tree.map(np.testing.assert_array_equal, params, average)
  jax.tree.map(np.testing.assert_array_equal, last, state.params)
  assert not np.array_equal(params["embed"], state.params["embed"])


def test_a_run_without_an_average_has_nothing_to_compare(saved):
  with jax.set_mesh(mesh_of(1, 1, 1)), pytest.raises(UserError, match="has no average"):
    checkpoint.load_params(saved, CONFIG, average=False)


def test_a_checkpoint_without_digests_does_not_count(saved):
  (saved / "checkpoints.digests" / "2.json").unlink()
  with jax.set_mesh(mesh_of(1, 1, 1)):
    checkpoints = checkpoint.Checkpoints(saved, keep=2)
    assert checkpoints.newest() == 1
    recovery.discard_unsealed(checkpoints)
    checkpoints.save(fresh(3), 2, next_row=99)  # It is written again.
    checkpoints.wait()
    assert checkpoints.newest() == 2
    checkpoints.close()


@pytest.mark.parametrize("damage", ["missing", "changed", "surplus"])
def test_a_damaged_file_is_refused(saved, damage):
  victim = next(
    p
    for p in sorted((saved / "checkpoints" / "2").rglob("*"))
    if p.is_file() and p.stat().st_size > 100
  )
  data = victim.read_bytes()
  victim.unlink()
  if damage == "surplus":
    victim.write_bytes(data)
    victim = victim.with_name("surplus")
  if damage != "missing":
    victim.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
  with jax.set_mesh(mesh_of(1, 1, 1)), pytest.raises(UserError, match=victim.name):
    checkpoint.load_params(saved, CONFIG)


@pytest.mark.parametrize(
  ("damaged", "removed", "remedy"),
  [
    (
      2,
      None,
      r"run `python -m launch\.checkpoints rollback --workdir=\S+ --step=1`, then `python",
    ),
    (1, None, r"; the newest sealed checkpoint is 2\.$"),
    (2, 1, r"; no other checkpoint is sealed: restore the file from a copy\.$"),
  ],
)
def test_a_damaged_file_is_refused_with_what_to_do(saved, damaged, removed, remedy):
  flip(largest_file(saved / "checkpoints" / str(damaged)))
  with checkpoint.Checkpoints(saved, keep=2) as checkpoints:
    if removed:
      checkpoints.delete(removed)
    with pytest.raises(UserError, match=remedy):
      checkpoints.check(damaged)


def test_a_save_that_was_not_finished_is_deleted_with_a_warning(saved, capsys):
  (saved / "checkpoints.digests" / "2.json").unlink()
  checkpoints = checkpoint.Checkpoints(saved, keep=2)
  assert recovery.newest_whole(checkpoints) == 1
  recovery.discard_unsealed(checkpoints)
  checkpoints.close()
  assert [p.name for p in (saved / "checkpoints").iterdir()] == ["1"]
  assert "warning: checkpoint 2 in" in capsys.readouterr().out


def test_a_newer_checkpoint_that_is_gone_is_named(saved, capsys):
  shutil.rmtree(saved / "checkpoints" / "2")
  checkpoints = checkpoint.Checkpoints(saved, keep=2)
  assert recovery.newest_whole(checkpoints) == 1
  checkpoints.close()
  assert "warning: checkpoint 2 is gone from" in capsys.readouterr().out


def test_a_first_save_that_was_killed_before_its_digests_gets_them(saved, capsys):
  expected = (saved / "checkpoints.digests" / "1.json").read_bytes()
  shutil.rmtree(saved / "checkpoints" / "2")
  for path in (saved / "checkpoints.digests").iterdir():
    path.unlink()
  # Of a process that this job does not have.
  (saved / "checkpoints.digests" / "1.part1").write_text('{"other": "digest"}')
  checkpoints = checkpoint.Checkpoints(saved, keep=2)
  recovery.discard_unsealed(checkpoints)
  assert recovery.newest_whole(checkpoints) == 1
  checkpoints.close()
  assert [path.name for path in (saved / "checkpoints.digests").iterdir()] == ["1.json"]
  assert (saved / "checkpoints.digests" / "1.json").read_bytes() == expected
  assert "warning: checkpoint 1 in" in capsys.readouterr().out


def largest_file(folder):
  return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


@pytest.mark.parametrize("digests", [None, b"", b"{}", b"[]", b"\x00\xff", b'{"a": 1}'])
def test_a_run_goes_back_to_the_newest_whole_checkpoint(saved, capsys, digests):
  """None: a file of the checkpoint is damaged; else its digests are."""
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
  assert [p.name for p in (saved / "checkpoints").iterdir()] == ["1"]
  assert [p.name for p in (saved / "checkpoints.digests").iterdir()] == ["1.json"]
  with jax.set_mesh(mesh_of(1, 1, 1)):
    checkpoints.save(fresh(3), 2, next_row=99)  # It is written again.
    checkpoints.wait()
  assert recovery.newest_whole(checkpoints) == 2
  checkpoints.close()


def test_a_step_to_go_back_to_leaves_no_digests_after_it(saved):
  """Neither of a checkpoint that is deleted nor of one that is gone."""
  shutil.copy(saved / "checkpoints.digests" / "2.json", saved / "checkpoints.digests" / "3.json")
  with checkpoint.Checkpoints(saved, keep=2) as checkpoints:
    recovery.go_back(checkpoints, 1)
  assert on_disk(saved) == [[1], [1]]


def test_a_step_to_go_back_to_must_be_sealed(saved):
  (saved / "checkpoints.digests" / "1.json").unlink()
  with checkpoint.Checkpoints(saved, keep=2) as checkpoints:
    for step, state in ((1, "1 is there but not sealed; "), (9, "")):
      with pytest.raises(UserError, match=f"no sealed checkpoint of step {step}: {state}it has 2"):
        recovery.go_back(checkpoints, step)
  assert on_disk(saved) == [[1, 2], [2]]


def test_damaged_checkpoints_alone_are_refused_and_kept(saved):
  for step in ("1", "2"):
    flip(largest_file(saved / "checkpoints" / step))
  checkpoints = checkpoint.Checkpoints(saved, keep=2)
  with pytest.raises(
    UserError, match=r"^no checkpoint in .* is whole \(.*2.* is damaged.*1.* is dam"
  ):
    recovery.newest_whole(checkpoints)
  assert sorted(p.name for p in (saved / "checkpoints").iterdir()) == ["1", "2"]
  checkpoints.close()


def test_checkpoints_without_digests_are_kept_and_refused(saved):
  shutil.rmtree(saved / "checkpoints.digests")
  checkpoints = checkpoint.Checkpoints(saved, keep=2)
  with pytest.raises(UserError, match="no digests of them"):
    recovery.discard_unsealed(checkpoints)
  assert sorted(p.name for p in (saved / "checkpoints").iterdir()) == ["1", "2"]
  checkpoints.close()


def test_digests_of_a_deleted_checkpoint_do_not_count_for_the_next_of_its_step(saved):
  shutil.rmtree(saved / "checkpoints" / "2")
  with jax.set_mesh(mesh_of(1, 1, 1)):
    checkpoints = checkpoint.Checkpoints(saved, keep=2)
    checkpoints.save(fresh(3), 2, next_row=99)
    assert checkpoints.newest() == 1
    checkpoints.wait()
    assert checkpoints.newest() == 2
    checkpoints.close()


def small(step):
  return {"w": np.full(4, step, np.float32)}


def on_disk(folder):
  """Steps that are on the disk, and those that have digests."""
  return [
    sorted(int(path.stem) for path in (folder / name).iterdir())
    for name in ("checkpoints", "checkpoints.digests")
  ]


def test_checkpoints_are_kept_for_three_reasons_also_by_the_next_start(tmp_path):
  """The newest two, multiples of 3, and the two of lowest loss, which step 4 leaves again."""
  losses = {
    1: 5.0,
    2: 1.0,
    3: 9.0,
    4: 2.0,
    5: 7.0,
    6: 6.0,
    7: 1.5,
    8: float("nan"),
    9: 4.0,
    10: 8.0,
  }
  for starts in (range(1, 6), range(6, 11)):
    with checkpoint.Checkpoints(tmp_path, 2, keep_every=3, keep_best=2) as checkpoints:
      for step in starts:
        checkpoints.save(small(step), step, next_row=step, heldout_loss=losses[step])
  assert on_disk(tmp_path) == [[2, 3, 6, 7, 9, 10]] * 2


def save_and_fail(folder):
  with checkpoint.Checkpoints(folder, 2) as checkpoints:
    checkpoints.save(small(1), 1, next_row=1)
    raise ZeroDivisionError


def test_a_save_in_flight_is_finished_when_an_error_ends_the_run(tmp_path):
  with pytest.raises(ZeroDivisionError):
    save_and_fail(tmp_path)
  assert on_disk(tmp_path) == [[1], [1]]


# Ends with an error while a checkpoint of 200 MB is written.
FAILS = """
import sys
import jax.numpy as jnp
from cm3leon_jax.commands import common
from cm3leon_jax.config import UserError
from cm3leon_jax.training.checkpoint import Checkpoints
def main(workdir):
  with Checkpoints(workdir, 2) as checkpoints:
    checkpoints.save({"w": jnp.arange(50_000_000, dtype=jnp.float32)}, 1, 1)
    raise UserError("the sentence.")
common.run(main, config=False)
"""


def test_a_save_in_flight_does_not_bury_the_sentence_of_an_error(tmp_path):
  result = subprocess.run(
    [sys.executable, "-c", FAILS, f"--workdir={tmp_path}"],
    capture_output=True, text=True, timeout=300, check=False,
  )  # fmt: skip
  assert (result.returncode, result.stderr) == (2, "error: the sentence.\n")
  assert on_disk(tmp_path) == [[1], [1]]


# Saves 4 kB, and then 40 MB, of which a file may have only 1 MB, as on a full disk.
FULL_DISK = """
import resource, time
import jax.numpy as jnp
from cm3leon_jax.commands import common
from cm3leon_jax.training.checkpoint import Checkpoints
def main(workdir):
  with Checkpoints(workdir, 2) as checkpoints:
    checkpoints.save({"w": jnp.ones(1_000)}, 1, 1)
    checkpoints.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, resource.RLIM_INFINITY))
    checkpoints.save({"w": jnp.sin(jnp.arange(10_000_000.0))}, 2, 2)
    for _ in range(1_000):  # Steps.
      checkpoints.check_save()
      time.sleep(0.05)
common.run(main, config=False)
"""


def test_a_save_that_fails_is_reported_in_the_loop_and_leaves_the_one_before(tmp_path):
  result = subprocess.run(
    [sys.executable, "-c", FULL_DISK, f"--workdir={tmp_path}"],
    capture_output=True, text=True, timeout=300, check=False,
  )  # fmt: skip
  assert result.returncode == TryAgain.exit_code
  last = result.stderr.splitlines()[-1]
  assert last.startswith(f"error: checkpoint 2 could not be written to {tmp_path}/checkpoints (")
  assert last.endswith("): the same command continues from checkpoint 1.")
  checkpoints = checkpoint.Checkpoints(tmp_path, 2)
  assert recovery.newest_whole(checkpoints) == 1
  checkpoints.close()


@pytest.mark.parametrize("saves", [0, 1, 2])
def test_a_bucket_that_fails_ends_the_run_with_the_checkpoint_that_is_whole(tmp_path, saves):
  """Whatever the loop was doing; the save in flight is finished first."""
  gone = RuntimeError("All 32 retry attempts failed: status 503")
  where = f"checkpoint {saves}" if saves else "its newest checkpoint, if it has one"
  sentence = (
    f"{tmp_path}: a bucket did not answer, or with errors, until the last try (RuntimeError: "
    f"{gone}): the same command continues from {where}."
  )

  def run():
    with checkpoint.Checkpoints(tmp_path, 2) as checkpoints:
      for step in range(1, saves + 1):
        checkpoints.save(small(step), step, next_row=step)
      raise UserError("a file is damaged") from gone

  with pytest.raises(TryAgain) as caught:
    run()
  assert str(caught.value) == sentence
  assert checkpoint.newest_step(tmp_path) == saves


def test_a_checkpoint_in_a_bucket_that_does_not_answer_is_no_damaged_one(saved, monkeypatch):
  """Damaged checkpoints are deleted; the errors of gcsfs are OSErrors, as those of a disk are."""
  aiohttp = pytest.importorskip("aiohttp")
  checkpoints = checkpoint.Checkpoints(saved, 2)
  steps = checkpoints.sealed()
  monkeypatch.setattr(sealing, "digest", mock.Mock(side_effect=aiohttp.SocketTimeoutError("gone")))
  with pytest.raises(aiohttp.SocketTimeoutError):
    recovery.newest_whole(checkpoints)
  assert checkpoints.sealed() == steps != []
  monkeypatch.setattr(sealing, "digest", mock.Mock(side_effect=OSError("of a disk")))
  with pytest.raises(UserError, match="is whole"):
    recovery.newest_whole(checkpoints)
  checkpoints.close()


def test_digests_in_a_bucket_that_does_not_answer_are_not_damaged(saved, monkeypatch):
  """As gcsfs raises an error whose text has the word "invalid"."""
  path_type = type(epath.Path(saved))
  read = path_type.read_text

  def read_text(path, *args, **options):
    if path.name == "2.json":
      raise ValueError("Bad Request: b/bucket/o\ninvalid token, try again")
    return read(path, *args, **options)

  with jax.set_mesh(mesh_of(1, 1, 1)):
    checkpoints = checkpoint.Checkpoints(saved, keep=2)
    monkeypatch.setattr(path_type, "read_text", read_text)
    reason = r"a bucket did not answer, .*\(ValueError: Bad Request: b/bucket/o invalid token"
    with pytest.raises(TryAgain, match=reason), checkpoints:
      recovery.newest_whole(checkpoints)
  assert (saved / "checkpoints" / "2").exists()


def test_a_job_that_lost_its_lease_neither_saves_nor_seals(tmp_path):
  lost = UserError("another job took the lease")
  check = mock.Mock(side_effect=[None, lost, lost])  # Before a save, before it is sealed, ...
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
  """They are computed while the loop goes on, however long that takes."""
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


def test_old_checkpoints_and_their_digests_go(saved):
  with jax.set_mesh(mesh_of(1, 1, 1)):
    checkpoints = checkpoint.Checkpoints(saved, keep=2)
    checkpoints.save(fresh(3), 3, next_row=24)
    checkpoints.close()
  assert sorted(p.stem for p in (saved / "checkpoints.digests").iterdir()) == ["2", "3"]

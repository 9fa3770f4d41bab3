import dataclasses
import shutil

import jax
import numpy as np
import pytest

from cm3leon_jax.config import UserError
from cm3leon_jax.training import checkpoint
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
    checkpoints.discard_unsealed()
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


def test_a_save_that_was_not_finished_is_deleted_with_a_warning(saved, capsys):
  (saved / "checkpoints.digests" / "2.json").unlink()
  checkpoints = checkpoint.Checkpoints(saved, keep=2)
  assert checkpoints.newest_whole() == 1
  checkpoints.discard_unsealed()
  checkpoints.close()
  assert [p.name for p in (saved / "checkpoints").iterdir()] == ["1"]
  assert "warning: checkpoint 2 in" in capsys.readouterr().out


def test_a_newer_checkpoint_that_is_gone_is_named(saved, capsys):
  shutil.rmtree(saved / "checkpoints" / "2")
  checkpoints = checkpoint.Checkpoints(saved, keep=2)
  assert checkpoints.newest_whole() == 1
  checkpoints.close()
  assert "warning: checkpoint 2 is gone from" in capsys.readouterr().out


def test_a_first_save_that_was_killed_before_its_digests_gets_them(saved, capsys):
  expected = (saved / "checkpoints.digests" / "1.json").read_bytes()
  shutil.rmtree(saved / "checkpoints" / "2")
  for path in (saved / "checkpoints.digests").iterdir():
    path.unlink()
  checkpoints = checkpoint.Checkpoints(saved, keep=2)
  checkpoints.discard_unsealed()
  assert checkpoints.newest_whole() == 1
  checkpoints.close()
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
  assert checkpoints.newest_whole() == 1
  [warning] = capsys.readouterr().out.splitlines()
  assert "is damaged" in warning
  assert warning.endswith("; the run goes back to checkpoint 1.")
  assert [p.name for p in (saved / "checkpoints").iterdir()] == ["1"]
  assert [p.name for p in (saved / "checkpoints.digests").iterdir()] == ["1.json"]
  with jax.set_mesh(mesh_of(1, 1, 1)):
    checkpoints.save(fresh(3), 2, next_row=99)  # It is written again.
    checkpoints.wait()
  assert checkpoints.newest_whole() == 2
  checkpoints.close()


def test_damaged_checkpoints_alone_are_refused_and_kept(saved):
  for step in ("1", "2"):
    flip(largest_file(saved / "checkpoints" / step))
  checkpoints = checkpoint.Checkpoints(saved, keep=2)
  with pytest.raises(
    UserError, match=r"^no checkpoint in .* is whole \(.*2.* is damaged.*1.* is dam"
  ):
    checkpoints.newest_whole()
  assert sorted(p.name for p in (saved / "checkpoints").iterdir()) == ["1", "2"]
  checkpoints.close()


def test_checkpoints_without_digests_are_kept_and_refused(saved):
  shutil.rmtree(saved / "checkpoints.digests")
  checkpoints = checkpoint.Checkpoints(saved, keep=2)
  with pytest.raises(UserError, match="no digests of them"):
    checkpoints.discard_unsealed()
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


def test_old_checkpoints_and_their_digests_go(saved):
  with jax.set_mesh(mesh_of(1, 1, 1)):
    checkpoints = checkpoint.Checkpoints(saved, keep=2)
    checkpoints.save(fresh(3), 3, next_row=24)
    checkpoints.close()
  assert sorted(p.stem for p in (saved / "checkpoints.digests").iterdir()) == ["2", "3"]

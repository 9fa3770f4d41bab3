"""Tests that bit flips are found, the faulty device is named, and there are no false alarms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm3leon_jax.config.training import TrainConfig
from cm3leon_jax.errors import TryAgain, UserError
from cm3leon_jax.training.faults import replay
from cm3leon_jax.training.faults.assignment import moved, rolled
from cm3leon_jax.training.faults.fingerprint import (
  different_replicas,
  fingerprint,
  fingerprint_of,
  first_replicas,
  names_of,
)
from cm3leon_jax.training.faults.replay import Replay, replaying
from cm3leon_jax.training.steps import Steps
from tests.models.tiny import mesh_of
from tests.refusals import refused
from tests.training import runs
from tests.training.fakes import FakeState
from tests.training.faults import flips


def tree_on(mesh):
  """Makes arrays of several dtypes that are fully sharded, partly sharded, or replicated."""
  rng = np.random.default_rng(0)
  host = {
    "split": (rng.normal(size=(8, 6)).astype(np.float32), jax.P(("tensor", "fsdp"), None)),
    "half": (rng.normal(size=(4, 6)).astype(jnp.bfloat16), jax.P("fsdp", None)),
    "whole": (np.int32([7, -8]), jax.P(None)),
    "flag": (np.bool_(True), jax.P()),
  }
  return {
    name: jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))
    for name, (x, spec) in host.items()
  }


def flipped(x, place: int, rng):
  """Flips a random bit of an array on one device, given by its index in the mesh."""
  device, held = x.sharding.mesh.devices.flat[place], []
  for shard in x.addressable_shards:
    data = np.array(shard.data)
    if shard.device == device:
      content = bytearray(data.tobytes())
      bit = 0 if data.dtype == bool else rng.integers(8)
      content[rng.integers(len(content))] ^= 1 << int(bit)
      data = np.frombuffer(bytes(content), data.dtype).reshape(data.shape)
    held.append(jax.device_put(data, shard.device))
  return jax.make_array_from_single_device_arrays(x.shape, x.sharding, held)


def test_a_flipped_bit_changes_one_number_of_a_digest():
  """Flips a bit of each array on each device. Only the digest of this array and device changes."""
  mesh, rng = mesh_of(2, 2, 2), np.random.default_rng(1)
  with jax.set_mesh(mesh):
    tree = tree_on(mesh)
    first = jax.device_get(fingerprint_of(tree))
    assert names_of(tree) == ["flag", "half", "split", "whole"]
    for name in tree:
      for place in range(mesh.size):
        with np.errstate(all="ignore"):
          other = {**tree, name: flipped(tree[name], place, rng)}
        found = first == jax.device_get(fingerprint_of(other))
        expected = np.ones((8, 4), bool)
        expected[place, names_of(tree).index(name)] = False
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(first, jax.device_get(fingerprint_of(tree)))


def test_a_digest_by_hand():
  with jax.set_mesh(mesh_of(1, 1, 1)):
    x = jax.device_put(np.float32([[0.0, 1.0], [2.0, -3.0]]), jax.P(None, None))
    found = jax.device_get(jax.jit(fingerprint)(x))
  weights = [(i * 0x9E3779B1) % 2**32 for i in range(4)]
  words = [0, 0x3F800000, 0x40000000, 0xC0400000]
  assert found.tolist() == [[sum(w * (v | 1) for w, v in zip(words, weights)) % 2**32]]


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 4, 1), (4, 1, 1), (1, 1, 1)])
def test_moved_arrays_are_the_same_on_other_devices(shape):
  mesh = mesh_of(*shape)
  tree = tree_on(mesh)
  target = rolled(mesh)
  for x, y in zip(*map(jax.tree.leaves, (tree, moved(tree, mesh))), strict=True):
    assert y.sharding == jax.sharding.NamedSharding(target, x.sharding.spec)
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
    buffers = [{s.data.unsafe_buffer_pointer() for s in a.addressable_shards} for a in (x, y)]
    # `moved` must copy: steps donate both the tree and the copy, one after the other.
    assert not buffers[0] & buffers[1]


def test_each_shard_has_another_device_in_the_other_computation():
  for shape in ((1, 8, 1), (2, 2, 2), (8, 1, 1), (1, 1, 4), (1, 2, 2, 2), (1, 3, 1)):
    mesh = mesh_of(*shape)
    assert all(a != b for a, b in zip(mesh.devices.flat, rolled(mesh).devices.flat))


def numbers_of(*digests: int) -> np.ndarray:
  """Returns the fingerprint of one array, given the digest on each device."""
  return np.uint32(digests)[:, None]


@pytest.fixture(scope="module")
def trainer():
  """Returns a trainer with compiled programs and two replicas of each shard."""
  result = flips.Trainer((2, 2, 1), 1, layers=1)
  result.trial("none", np.random.default_rng(0))
  return result


@pytest.mark.parametrize("kind", flips.KINDS)
def test_a_flip_is_found_and_its_device_named(trainer, kind):
  found = trainer.trial(kind, np.random.default_rng([5, 0]))
  assert (found["found"], found["named"], found["recovered"]) == (True, True, None), found
  assert (" has changed on " in found["sentence"]) is (kind in ("parameters", "moments"))


def test_no_flip_is_no_alarm(trainer):
  found = trainer.trial("none", np.random.default_rng(5))
  assert (found["found"], found["recovered"]) == (False, True)


NO_STEPS = Steps(*[pytest.fail] * 4)  # The test fails if one of these functions is called.


def wrong_replay(step=0, **fields):
  """Makes a `Replay` on 4 devices that can judge and report, but runs no steps."""
  mesh = mesh_of(1, 4, 1)
  config = TrainConfig(**{"replay_every": 2, "checkpoint_every": 500, **fields})
  return Replay(NO_STEPS, config, step, mesh)


def test_a_changed_state_starts_again_unless_a_checkpoint_may_hold_it():
  before = numbers_of(1, 2, 3, 4)
  changed = replay._changed(before, numbers_of(1, 2, 3, 5))
  assert changed == ([0], [3])
  assert replay._changed(None, before) == replay._changed(before, before) == ([], [])
  with refused(TryAgain, "step 1", "step 2", "b has changed"):
    wrong_replay(2)._raise_changed(([1], [3]), ["a", "b"])
  with refused(UserError, "Checkpoint 1", "rollback", exit_code=2):
    wrong_replay(2, checkpoint_every=1)._raise_changed(([1], [3]), ["a", "b"])


def test_replicas_of_a_shard_by_hand():
  """Covers the examples in the docstrings."""
  mesh = mesh_of(2, 2, 1)
  with jax.set_mesh(mesh):
    x = {"split": jnp.zeros(2, out_sharding=jax.P("fsdp")), "whole": jnp.zeros(2)}
    assert first_replicas(x, mesh).tolist() == [[0, 0], [1, 0], [0, 0], [1, 0]]

  def found(digests, first):
    return different_replicas(numbers_of(*digests), np.array(first)[:, None])

  assert found([7, 7, 5, 7, 7], [0] * 5) == ([0], [2])
  assert found([7, 8, 7, 9], [0, 1, 0, 1]) == ([0], [1, 3])
  assert found([7, 7, 5, 5], [0] * 4) == ([0], [0, 1, 2, 3])
  assert found([7, 8, 7, 8], [0, 1, 0, 1]) == ([], [])
  assert found([7, 8, 9, 6], [0, 1, 2, 3]) == ([], [])
  # Of three replicas, the first may be the wrong one.
  assert found([5, 7, 7], [0] * 3) == ([0], [0])


def test_a_flip_in_one_replica_is_found_at_the_next_checked_step(trainer):
  """Flips a bit of parameters or moments in an unchecked step; the next checked step finds it."""
  for seed, kind in enumerate(flips.REPLICAS):
    found = trainer.trial(kind, np.random.default_rng([7, seed]))
    assert (found["found"], found["named"], found["recovered"]) == (True, True, None), found
    assert "step 5 reads replicas that are not equal but were equal at step 0" in found["sentence"]


def test_a_flip_in_one_replica_stays_if_replicas_are_not_compared(trainer, monkeypatch):
  """Negative control: without the comparison of replicas, the run continues with the flip."""
  monkeypatch.setattr(replay, "different_replicas", lambda *args: ([], []))
  found = trainer.trial(flips.REPLICAS[0], np.random.default_rng([7, 0]))
  assert (found["found"], found["recovered"]) == (False, False)


def test_different_replicas_start_again_unless_a_checkpoint_may_hold_them():
  """Replicas were equal at the start or the last checked step; a save since then may be wrong."""
  one, pair, names = ([1], [3]), ([0, 1], [1, 3]), ["a", "b"]
  with refused(TryAgain, "step 9", "b; device"):
    wrong_replay(9, checkpoint_every=9)._raise_apart(one, names)
  wrong = wrong_replay(4, checkpoint_every=5)
  wrong._step = 6
  with refused(UserError, "Checkpoint 5", "a, b", "unknown", exit_code=2):
    wrong._raise_apart(pair, names)
  wrong._sound = 5
  with pytest.raises(TryAgain):
    wrong._raise_apart(pair, names)
  wrong_replay()._raise_apart(([], []), names)


@pytest.mark.slow
def test_a_run_with_checked_steps_learns_the_same(whole, loader, tmp_path, capsys):
  """On the CPU, results are equal bit for bit. With one device, the run prints a note."""
  runs.run(tmp_path, loader, replay_every=5)
  assert capsys.readouterr().out.count("one step in 5 is checked on the only device") == 1
  assert runs.losses(tmp_path) == runs.losses(whole[0])


def test_without_replay_the_steps_are_those_of_before():
  assert replaying(NO_STEPS, TrainConfig(), FakeState()) is NO_STEPS

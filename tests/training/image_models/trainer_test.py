import dataclasses
import functools
import os
import signal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from cm3leon_jax.errors import INTERRUPTED, UserError
from cm3leon_jax.files.json_files import read_json_lines, write_json
from cm3leon_jax.mesh import FSDP
from cm3leon_jax.training.faults import lease
from cm3leon_jax.training.image_models import trainer
from tests.models.tiny import mesh_of
from tests.refusals import refused


@dataclasses.dataclass(frozen=True)
class Config:
  steps: int = 12
  batch_size: int = 8
  learning_rate: float = 0.1
  checkpoint_every: int = 5


class Killed(Exception):
  """Raised in place of a kill during training."""


@dataclasses.dataclass
class Examples:
  """Makes 20 examples; raises `Killed` after `reads_left` reads. Records the rows read."""

  reads_left: int = 1_000
  seed: int = 0
  rows: list = dataclasses.field(default_factory=list)

  def __len__(self):
    return 20

  def __getitem__(self, rows):
    self.reads_left -= 1
    if self.reads_left < 0:
      raise Killed
    self.rows.append(rows)
    x = np.random.default_rng(self.seed).normal(size=(20, 3)).astype(np.float32)
    return x[rows], x[rows] @ np.float32([1, -2, 3])


@functools.partial(jax.jit, donate_argnums=0, static_argnums=2)
def update(state, batch, learning_rate, i):
  x, y = batch
  loss, gradient = jax.value_and_grad(lambda w: jnp.mean((x @ w - y) ** 2))(state["w"])
  noise = 1e-3 * jax.random.normal(jax.random.fold_in(jax.random.key(0), i), (3,))
  return {"w": state["w"] - learning_rate * gradient + noise}, {"loss": loss}


def train(
  folder, config=Config(), examples=None, seed=0, devices=(1, 1, 1), shapes=None, inputs="raw"
):
  def step(state, batch, i):
    if shapes is not None:
      shapes.append([x.sharding.shard_shape(x.shape) for x in batch])
    return update(state, batch, config.learning_rate, i)

  def init():
    return {"w": jnp.zeros(3)}

  examples, about = examples or Examples(), {"inputs": {"raw": inputs}}
  with jax.set_mesh(mesh_of(*devices)):
    arguments = "clip", config, about, seed, examples, folder, init, step
    return trainer.train(trainer.SmallTraining(*arguments))["w"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  return train(tmp_path_factory.mktemp("whole"))


def kill_in_step_11(folder):
  with pytest.raises(Killed):
    train(folder, examples=Examples(reads_left=11))


def test_a_killed_training_continues_bit_for_bit(tmp_path, whole):
  kill_in_step_11(tmp_path)
  rest = Examples()
  np.testing.assert_array_equal(train(tmp_path, examples=rest), whole)
  assert len(rest.rows) == 2  # Runs only steps 10 and 11 again.
  lines = read_json_lines(tmp_path / "metrics.jsonl")
  assert [line["step"] for line in lines] == [10, 10, 12]
  assert lines[1]["event"] == "resumed"
  trainer.delete_checkpoints(tmp_path)
  assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
  assert (train(tmp_path / "other", seed=1) != whole).any()


def test_a_signal_saves_and_the_same_call_continues_bit_for_bit(tmp_path, whole, capsys):
  class Stopped(Examples):
    def __getitem__(self, rows):
      if len(self.rows) == 6:
        os.kill(os.getpid(), signal.SIGTERM)
      return super().__getitem__(rows)

  examples = Stopped()
  with pytest.raises(SystemExit) as end:
    train(tmp_path, examples=examples)
  assert (end.value.code, len(examples.rows)) == (INTERRUPTED, 7)
  sentence = f"stopped at step 7 of 12; saved in {tmp_path}: the same command continues.\n"
  assert sentence in capsys.readouterr().out
  assert not (tmp_path / lease.NAME).exists()
  rest = Examples()
  np.testing.assert_array_equal(train(tmp_path, examples=rest), whole)
  assert len(rest.rows) == 5


def test_a_training_that_lost_its_lease_stops_and_saves_no_more(tmp_path, monkeypatch):
  monkeypatch.setattr(lease, "BEAT_SECONDS", 60.0)

  class Taken(Examples):
    def __getitem__(self, rows):
      # Another job takes the lease before step 3, and so before the first save in step 5.
      if len(self.rows) == 3:
        write_json(tmp_path / lease.NAME, {"token": "other", "host": "elsewhere", "pid": 7})
      return super().__getitem__(rows)

  with refused(UserError, "process 7 on elsewhere took"):
    train(tmp_path, examples=Taken())
  assert list((tmp_path / trainer.FOLDER / "checkpoints").iterdir()) == []


def test_another_training_is_refused_and_another_length_starts_anew(tmp_path, capsys):
  kill_in_step_11(tmp_path)
  for config, seed in (
    (dataclasses.replace(Config(), learning_rate=0.2), 0),
    (dataclasses.replace(Config(), steps=13), 1),
  ):
    with refused(UserError, "another config", "seed" if seed else "learning_rate"):
      train(tmp_path, config, seed=seed)
  longer = Examples()
  train(tmp_path, dataclasses.replace(Config(), steps=13), longer)
  assert len(longer.rows) == 13
  assert "starts again" in capsys.readouterr().out


def test_checkpoints_without_their_config_are_refused_and_kept(tmp_path, whole):
  kill_in_step_11(tmp_path)
  path = tmp_path / trainer.FOLDER / "config.json"
  content = path.read_bytes()
  path.unlink()
  with refused(UserError, str(path), "is missing"):
    train(tmp_path, seed=3)
  assert not path.exists()
  path.write_bytes(content)
  rest = Examples()
  np.testing.assert_array_equal(train(tmp_path, examples=rest), whole)
  assert len(rest.rows) == 2


def test_other_data_of_equal_length_starts_anew(tmp_path, whole, capsys):
  train(tmp_path)
  other = Examples(seed=1)
  found = train(tmp_path, examples=other, inputs="made again")
  assert len(other.rows) == 12
  expected = train(tmp_path / "other", examples=Examples(seed=1))
  np.testing.assert_array_equal(found, expected)
  assert (found != whole).any()
  assert "clip: starts again, with other steps or data (inputs.raw: raw" in capsys.readouterr().out
  with refused(UserError, "another config", "seed"):
    train(tmp_path, seed=1)


@pytest.mark.parametrize("devices", [(2, 1, 1, 2)])
def test_the_batch_is_split_over_the_mesh(tmp_path, whole, devices):
  shapes = []
  found = train(tmp_path, devices=devices, shapes=shapes)
  np.testing.assert_allclose(found, whole, rtol=1e-5)
  parts = int(np.prod(devices)) // (devices[2])
  assert shapes == [[(8 // parts, 3), (8 // parts,)]] * 12


@pytest.mark.parametrize(
  ("shape", "spec"),
  [
    ((3, 3, 128, 64), P(None, None, FSDP, None)),
    ((256, 256), P(FSDP, None)),  # Of equal dimensions, the first is sharded.
    ((65_538, 8), P(None, FSDP)),  # The largest dimension is not divisible by 4.
    ((8, 8_191), P()),
    ((65_537,), P()),
    ((), P()),
  ],
)
def test_layout_of_arrays_in_literals(shape, spec):
  with jax.set_mesh(mesh_of(2, 2, 1, 2)):
    assert trainer.layout(shape) == spec


def test_batches_that_cannot_be_are_refused(tmp_path):
  with refused(UserError, "batch_size is 21", "20 training images"):
    train(tmp_path, dataclasses.replace(Config(), batch_size=21))
  with refused(UserError, "batch_size is 6", "4 must divide it"):
    train(tmp_path, dataclasses.replace(Config(), batch_size=6), devices=(1, 4, 1))


def test_a_training_that_diverges_ends_and_nothing_of_it_is_kept(tmp_path):
  config = Config(learning_rate=1e30, checkpoint_every=50)
  with refused(UserError, "clip: step 10", "loss", "config.clip.learning_rate"):
    train(tmp_path, config)
  folder = tmp_path / trainer.FOLDER / "checkpoints"
  assert [path.name for path in folder.iterdir()] == []
  assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_a_model_that_diverges_in_its_last_step_is_not_returned(tmp_path):
  """The loss of the last step is finite, because it is computed before the update."""
  with refused(UserError, "the model is not saved", "w"):
    train(tmp_path, Config(steps=1, batch_size=8, learning_rate=float("inf")))


def test_an_epoch_visits_every_example_once():
  rows = [trainer.batch_rows(step, 20, 5, 7) for step in range(8)]
  epochs = [np.concatenate(rows[:4]), np.concatenate(rows[4:])]
  assert [sorted(epoch) for epoch in epochs] == [list(range(20))] * 2
  assert (epochs[0] != epochs[1]).any()
  assert (trainer.batch_rows(0, 20, 5, 8) != rows[0]).any()
  literal = np.random.default_rng([7, 1]).permutation(20)[5:10]
  # Published runs depend on this order of examples.
  np.testing.assert_array_equal(rows[5], literal)

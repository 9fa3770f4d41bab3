"""Tests the codebook collapse alarm, the image grid and averaged parameters in real trainings."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from cm3leon_jax.config import UserError
from cm3leon_jax.files.json_files import read_json_lines
from cm3leon_jax.tokenizers.vqgan import ImageTokenizer
from cm3leon_jax.training.small import trainer, vqgan_training, vqgan_watch
from cm3leon_jax.training.small.vqgan_watch import Alarm
from cm3leon_jax.training.watch.tensorboard_board import curves
from tests.models.tiny import mesh_of
from tests.refusals import refused
from tests.tokenizers.tiny import tiny_config

LENGTH = {"steps": 180, "batch_size": 64, "restart_every": 20, "checkpoint_every": 1_000}
HEALTHY = tiny_config(resolution=16, code_dim=8, learning_rate=3e-3, **LENGTH)
COLLAPSING = dataclasses.replace(
  HEALTHY, restart_every=0, commitment_weight=100.0, learning_rate=0.1
)
NUM_CODES = 1_024


@pytest.fixture(scope="module")
def images():
  squares = np.random.default_rng(0).integers(0, 256, (128, 4, 4, 3))
  return np.repeat(np.repeat(squares, 4, 1), 4, 2).astype(np.uint8)


def train(config, images, folder, devices=8, **options):
  with jax.set_mesh(mesh_of(1, devices, 1)):
    return vqgan_training.train(config, NUM_CODES, 0, images, folder, {}, **options)


class Recorder:
  def __init__(self):
    self.lines, self.sheets, self.closed = {}, {}, False

  def scalars(self, step, values):
    self.lines[step] = values

  def samples(self, step, sheet):
    self.sheets[step] = sheet

  def flush(self):
    pass

  def close(self):
    self.closed = True


@pytest.mark.slow
def test_a_collapse_is_named_with_its_remedy_within_200_steps(images, tmp_path, capsys):
  train(COLLAPSING, images, tmp_path)
  out = capsys.readouterr().out
  (line,) = [line for line in out.splitlines() if "collapsed" in line]
  step = int(re.match(r"vqgan: step (\d+): the codebook has collapsed", line)[1])
  low = [x["step"] for x in read_json_lines(tmp_path / "metrics.jsonl") if x["perplexity"] < 25.6]
  assert low[0] < step <= low[0] + 100 <= 180
  assert "for 100 steps, each batch has used at most 51 of 1,024 codes, now " in line
  assert "Set config.vqgan.restart_every to 100 (it is 0), lower config.vqgan.commit" in line
  assert "commitment_weight to 0.25 (it is 100), or set config.vqgan.quantizer to fsq; " in line
  assert line.endswith(f"delete {tmp_path / 'training'} to start again.")


@pytest.mark.parametrize("steps", [20, pytest.param(180, marks=pytest.mark.slow)])
def test_a_healthy_training_raises_no_alarm_and_shows_its_grids(images, tmp_path, capsys, steps):
  board = Recorder()
  config = dataclasses.replace(HEALTHY, steps=steps, checkpoint_every=steps // 2)
  tokenizer = train(
    config, images, tmp_path, 1, shown=images[:3], open_boards=lambda first_step: [board]
  )
  assert "collapsed" not in capsys.readouterr().out
  assert list(board.lines) == list(range(10, steps + 10, 10))
  assert {"train/perplexity", "train/codes_used", "train/mse"} <= curves(board.lines[steps]).keys()
  assert list(board.sheets) == [steps // 2, steps]
  assert board.closed
  sheet = np.asarray(Image.open(tmp_path / vqgan_watch.GRID))
  np.testing.assert_array_equal(sheet, np.asarray(board.sheets[steps]))
  assert sheet.shape == (2 * (20 + 128 + 4), 4 + 3 * (128 + 4), 3)  # Titles, images and gaps.
  decoded = tokenizer.decode(tokenizer.encode(images[:3]))
  for i, (image, reconstruction) in enumerate(zip(images, decoded)):
    column = sheet[:, 4 + i * 132 :][:, :128]
    np.testing.assert_array_equal(column[20:148:8, ::8], image)  # Images are enlarged eightfold.
    np.testing.assert_array_equal(column[172:300:8, ::8], reconstruction)
  titles = [np.asarray(sheet)[152:172] for sheet in board.sheets.values()]
  assert (titles[0] != titles[1]).any()
  assert (titles[0] < 64).any()


def test_alarm_in_literals():
  """With 1,024 codes in a batch, the limit is 51.2. A low perplexity alone gives no alarm."""
  alarm = Alarm(dataclasses.replace(HEALTHY, quantizer="fsq"), NUM_CODES, "delete it.")
  assert [alarm.check(step, 20.0, 51.0) is None for step in (10, 50, 100)] == [True] * 3
  line = alarm.check(110, 20.0, 51.0)
  assert line.endswith("Lower config.vqgan.learning_rate (it is 0.003); delete it.")
  assert alarm.check(120, 20.0, 51.0) is None  # Printed once per collapse.
  assert alarm.check(130, 1.1, 52.0) is None
  assert [alarm.check(step, 20.0, 51.0) is None for step in (140, 230, 240)] == [True, True, False]


def test_the_remedy_is_what_the_config_lacks():
  for fields, remedy in (
    ({"restart_every": 20}, ". Lower config.vqgan.learning_rate (it is 0.003), or set "),
    ({"restart_every": 300}, ". Set config.vqgan.restart_every to 100 (it is 300), or set "),
    (
      {"quantizer": "fsq", "restart_every": 0},
      ". Lower config.vqgan.learning_rate (it is 0.003); ",
    ),
    ({"commitment_weight": 1.0}, ". Lower config.vqgan.commitment_weight to "),
  ):
    alarm = Alarm(dataclasses.replace(HEALTHY, **fields), NUM_CODES, "delete it.")
    assert alarm.check(10, 1.0, 1.0) is None
    assert remedy in alarm.check(110, 1.0, 1.0)


def test_few_codes_are_no_collapse_but_one_of_several_is():
  for num_codes, used, rings in ((2, 2.0, False), (2, 1.0, True), (1, 1.0, False)):
    alarm = Alarm(HEALTHY, num_codes, "delete it.")
    assert alarm.check(10, used, used) is None
    assert bool(alarm.check(500, used, used)) == rings


def test_the_tokenizer_is_the_average_of_the_parameters(images):
  """Decays are min(0.5, (1 + t) / (10 + t)), that is 0.1, 2 / 11 and 0.25."""
  config = dataclasses.replace(HEALTHY, ema_decay=0.5)
  state = vqgan_training.init_state(config, NUM_CODES, 0)
  expected = np.asarray(state["params"]["encoder"]["conv_out"]["kernel"])
  for decay in (0.1, 2 / 11, 0.25):
    state, _ = vqgan_training.train_step(state, images[:64], config, False)
    kernel = np.asarray(state["params"]["encoder"]["conv_out"]["kernel"])
    expected = decay * expected + (1 - decay) * kernel
  tokenizer = vqgan_training.trained(config, NUM_CODES, state)
  found = tokenizer.params["encoder"]["conv_out"]["kernel"]
  np.testing.assert_allclose(found, expected, atol=1e-6)
  assert np.abs(found - kernel).max() > 1e-4


def test_a_restarted_code_restarts_in_the_average(images):
  config = dataclasses.replace(HEALTHY, ema_decay=0.99)
  state = vqgan_training.init_state(config, NUM_CODES, 0)
  state = vqgan_training.restart_dead_codes(state, images[:64], config, jax.random.key(0))
  params, average = state["params"]["codebook"], state["ema"]["codebook"]
  np.testing.assert_array_equal(params["table"], average["table"])  # All codes were dead.


class Killed(Exception):
  """Raised in place of a kill during training."""


@pytest.mark.slow
def test_a_killed_training_with_averages_ends_bit_for_bit(images, tmp_path):
  config = dataclasses.replace(
    HEALTHY, ema_decay=0.9, steps=6, checkpoint_every=2, restart_every=3,
    code_dim=64,  # With this width, the codebook is sharded over the devices.
  )  # fmt: skip
  whole = train(config, images, tmp_path / "whole").params

  class Dying:
    reads = 0

    def __len__(self):
      return len(images)

    def __getitem__(self, rows):
      self.reads += 1
      if self.reads > 5:
        raise Killed
      return images[rows]

  with pytest.raises(Killed):
    train(config, Dying(), tmp_path / "killed")
  continued = train(config, images, tmp_path / "killed").params
  jax.tree.map(np.testing.assert_array_equal, continued, whole)
  plain = dataclasses.replace(config, ema_decay=0.0)
  with pytest.raises(AssertionError):
    jax.tree.map(
      np.testing.assert_array_equal, train(plain, images, tmp_path / "plain").params, whole
    )


def named(tree):
  """Yields (key, array) of each array in a tree; keys are joined by dots."""
  for path, x in jax.tree.leaves_with_path(tree):
    yield jax.tree_util.keystr(path, simple=True, separator="."), x


@pytest.mark.slow
def test_one_device_and_eight_compute_the_same(images, tmp_path, monkeypatch):
  """Covers averaged parameters, the adaptive discriminator weight and all pixel losses.

  Kernels, codebook, and their moments and averages are sharded over the devices. The codebook is
  small: of many codes, two may be almost equally near to an encoding, and rounding would decide.
  """
  monkeypatch.setattr(trainer, "LOG_EVERY", 1)
  monkeypatch.setattr(trainer, "SPLIT_FROM", 128)
  states, take = [], vqgan_training.train_step

  def recorded(state, *arguments):
    states.append({k: x.sharding.shard_shape(x.shape) for k, x in named(state)})
    return take(state, *arguments)

  monkeypatch.setattr(vqgan_training, "train_step", recorded)
  config = dataclasses.replace(
    HEALTHY, ema_decay=0.9, steps=5, restart_every=2, adversarial_weight=0.8,
    adversarial_adaptive=True, adversarial_start=0.2, discriminator_width=4,
    discriminator_layers=2, multiscale_weight=0.5, gradient_weight=0.5,
  )  # fmt: skip
  losses = {}
  for devices in (1, 8):
    folder = tmp_path / str(devices)
    with jax.set_mesh(mesh_of(1, devices, 1)):
      vqgan_training.train(config, 64, 0, images, folder, {})
    losses[devices] = [line["loss"] for line in read_json_lines(folder / "metrics.jsonl")]
    table, kernel = (64 // devices, 8), (3, 3, 8, 48 // devices)
    for state in states:
      for part in ("params", "ema", "opt_state.0.mu", "opt_state.0.nu"):
        assert state[f"{part}.codebook.table"] == table
        assert state[f"{part}.decoder.conv_out.kernel"] == kernel
      assert state["discriminator.layers.0.kernel"] == (4, 4, 3, 4)  # 8 divides no dimension.
      assert state["discriminator.layers.1.kernel"] == (4, 4, 4, 8 // devices)
    assert len(states) == 5
    states.clear()
  np.testing.assert_allclose(losses[1], losses[8], rtol=1e-5, atol=1e-5)
  assert np.ptp(losses[1]) > 1e-2


def test_a_saved_average_loads(images, tmp_path):
  config = dataclasses.replace(HEALTHY, ema_decay=0.9)
  state, _ = vqgan_training.train_step(
    vqgan_training.init_state(config, NUM_CODES, 0), images[:64], config, False
  )
  tokenizer = vqgan_training.trained(config, NUM_CODES, state)
  tokenizer.save(tmp_path)
  loaded = ImageTokenizer.load(tmp_path)
  np.testing.assert_array_equal(loaded.encode(images), tokenizer.encode(images))


def test_features_must_fit_the_config(images, tmp_path):
  with refused(ValueError):
    train(HEALTHY, images, tmp_path, features={"0": jnp.zeros(1)})
  with pytest.raises(ValueError, match="give both, a file and a positive weight"):
    dataclasses.replace(HEALTHY, perceptual_weight=1.0)
  assert issubclass(UserError, ValueError)

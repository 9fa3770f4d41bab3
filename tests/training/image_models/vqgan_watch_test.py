"""Tests the image grid and averaged parameters in real trainings."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from cm3leon_jax.errors import UserError
from cm3leon_jax.files.json_files import read_json_lines
from cm3leon_jax.training.image_models import trainer, vqgan_training, vqgan_watch
from cm3leon_jax.training.watch.boards import curves
from tests.models.tiny import mesh_of
from tests.refusals import refused
from tests.tokenizers.tiny import tiny_config

LENGTH = {"steps": 180, "batch_size": 64, "restart_every": 20, "checkpoint_every": 1_000}
CONFIG = tiny_config(resolution=16, code_dim=8, learning_rate=3e-3, **LENGTH)
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


def test_a_training_shows_its_curves_and_grids(images, tmp_path):
  board, steps = Recorder(), 20
  config = dataclasses.replace(CONFIG, steps=steps, checkpoint_every=steps // 2)
  tokenizer = train(
    config, images, tmp_path, 1, shown=images[:3], open_boards=lambda first_step: [board]
  )
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


def test_the_tokenizer_is_the_average_of_the_parameters(images):
  """Decays are min(0.5, (1 + t) / (10 + t)), that is 0.1, 2 / 11 and 0.25."""
  config = dataclasses.replace(CONFIG, ema_decay=0.5)
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
  config = dataclasses.replace(CONFIG, ema_decay=0.99)
  state = vqgan_training.init_state(config, NUM_CODES, 0)
  state = vqgan_training.restart_dead_codes(state, images[:64], config, jax.random.key(0))
  params, average = state["params"]["codebook"], state["ema"]["codebook"]
  np.testing.assert_array_equal(params["table"], average["table"])  # All codes were dead.


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
    CONFIG, ema_decay=0.9, steps=5, restart_every=2, adversarial_weight=0.8,
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


def test_features_must_fit_the_config(images, tmp_path):
  with refused(ValueError, "perceptual_weight"):
    train(CONFIG, images, tmp_path, features={"0": jnp.zeros(1)})
  with pytest.raises(ValueError, match="give both, a file and a positive weight"):
    dataclasses.replace(CONFIG, perceptual_weight=1.0)
  assert issubclass(UserError, ValueError)

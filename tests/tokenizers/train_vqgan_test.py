"""Properties of the tokenizer's training."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from cm3leon_jax.config import UserError
from cm3leon_jax.tokenizers import train_vqgan, vqgan
from cm3leon_jax.tokenizers.vqgan import ImageTokenizer, VQGANConfig

CONFIG = VQGANConfig(
  resolution=8,
  downsample=4,
  stem=2,
  width=8,
  multipliers=(1, 1),
  encoder_blocks=(0, 0),
  decoder_blocks=(0, 0),
  code_dim=4,
  steps=12,
  batch_size=8,
  learning_rate=3e-3,
  warmup_steps=0,
  restart_every=4,
  adversarial_start=0.5,
  discriminator_width=4,
  discriminator_layers=2,
  checkpoint_every=5,
)
NUM_CODES = 16


@pytest.fixture(scope="module")
def images():
  """Flat colors with a darker square: uint8 [20, 8, 8, 3]."""
  rng = np.random.default_rng(0)
  x = np.broadcast_to(rng.integers(0, 256, (20, 1, 1, 3)), (20, 8, 8, 3)).astype(np.uint8)
  x[:, 2:6, 2:6] //= 2
  return x


def _assert_same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def _discriminator(seed):
  return train_vqgan.init_state(CONFIG, NUM_CODES, seed)["discriminator"]


class Killed(Exception):
  """Stands for a kill in the middle of training."""


@dataclasses.dataclass
class KilledAfter:
  """Images whose reading dies at the given read."""

  images: np.ndarray
  reads_left: int

  def __len__(self):
    return len(self.images)

  def __getitem__(self, indices):
    self.reads_left -= 1
    if self.reads_left < 0:
      raise Killed
    return self.images[indices]


def test_resume_equals_uninterrupted(images, tmp_path):
  whole = train_vqgan.train(CONFIG, NUM_CODES, 0, images, tmp_path / "whole")
  with pytest.raises(Killed):
    train_vqgan.train(CONFIG, NUM_CODES, 0, KilledAfter(images, 11), tmp_path)
  rest = KilledAfter(images, 2)  # Steps 10 and 11: nothing before the last state is done again.
  _assert_same(train_vqgan.train(CONFIG, NUM_CODES, 0, rest, tmp_path).params, whole.params)
  other = train_vqgan.train(CONFIG, NUM_CODES, 1, images, tmp_path / "other").params
  with pytest.raises(AssertionError):
    _assert_same(other, whole.params)
  with pytest.raises(UserError, match=r"seed: 0 -> 1"):
    train_vqgan.train(CONFIG, NUM_CODES, 1, images, tmp_path)
  (tmp_path / train_vqgan.CHECKPOINT).write_bytes(b"torn")
  with pytest.raises(UserError, match="is damaged"):
    train_vqgan.train(CONFIG, NUM_CODES, 0, images, tmp_path)


def test_training_improves_and_leaves_its_files(images, tmp_path):
  config = dataclasses.replace(CONFIG, steps=150, adversarial_weight=0.0, checkpoint_every=1_000)
  before = ImageTokenizer(config, NUM_CODES, train_vqgan.init_state(config, NUM_CODES, 0)["params"])
  untrained = train_vqgan.evaluate(before, images, images, tmp_path)
  summary = train_vqgan.train_vqgan(config, NUM_CODES, 0, images, images[:6], tmp_path)
  assert summary["psnr_db"] > untrained["psnr_db"] + 4
  assert sorted(p.name for p in tmp_path.iterdir()) == [
    "config.json",
    "params.safetensors",
    "reconstructions.npz",
  ]
  shown = np.load(tmp_path / "reconstructions.npz")
  np.testing.assert_array_equal(shown["originals"], images[:6])
  tokenizer = ImageTokenizer.load(tmp_path)
  np.testing.assert_array_equal(
    shown["reconstructions"], tokenizer.decode(tokenizer.encode(images[:6]))
  )
  errors = ((shown["originals"] / 255 - shown["reconstructions"] / 255) ** 2).mean((1, 2, 3))
  assert summary["psnr_db"] == pytest.approx(np.mean(10 * np.log10(1 / errors)))
  assert summary["psnr_of_mean_mse_db"] == pytest.approx(10 * np.log10(1 / errors.mean()))


def test_only_dead_codes_restart_and_at_encodings(images):
  state = train_vqgan.init_state(CONFIG, NUM_CODES, 0)
  usage = np.arange(NUM_CODES) % 3
  state["usage"] = jnp.asarray(usage, jnp.int32)
  old, encoder = (
    np.asarray(state["params"]["codebook"]["table"]),
    jax.tree.map(np.asarray, state["params"]["encoder"]),
  )
  model = vqgan.bind(CONFIG, NUM_CODES, jax.tree.map(jnp.copy, state["params"]))
  z = np.asarray(vqgan.l2_normalize(model.encoder(vqgan.to_float(images)))).reshape(-1, 4)
  state = train_vqgan.restart_dead_codes(state, images, CONFIG, jax.random.key(3))
  new = np.asarray(state["params"]["codebook"]["table"])
  np.testing.assert_array_equal(new[usage > 0], old[usage > 0])
  to_encoding = np.abs(new[:, None] - z[None]).max(-1).min(-1)
  assert (to_encoding[usage == 0] < 1e-5).all()
  assert (to_encoding[usage > 0] > 1e-3).any()
  assert not state["usage"].any()
  _assert_same(state["params"]["encoder"], encoder)


def test_usage_counts_every_code(images):
  state, metrics = train_vqgan.train_step(
    train_vqgan.init_state(CONFIG, NUM_CODES, 0), images[:8], CONFIG, False
  )
  assert int(state["usage"].sum()) == 8 * CONFIG.image_tokens
  assert int(state["step"]) == 1
  assert set(metrics) == {"loss", "mse"}


def test_discriminator_learns_to_tell_apart(images):
  """Against fixed reconstructions its hinge loss falls from 2 (no idea) towards 0."""
  params, x = _discriminator(0), vqgan.to_float(images)
  y = x + 0.5 * jax.random.normal(jax.random.key(0), x.shape)
  step = jax.jit(jax.value_and_grad(lambda p: train_vqgan.discriminator_loss(p, CONFIG, x, y)))
  start = step(params)[0]
  for _ in range(200):
    params = jax.tree.map(lambda p, g: p - 0.03 * g, params, step(params)[1])
  assert step(params)[0] < 0.5 * start


def test_hinge_loss_literals():
  """A discriminator whose last bias is c and whose kernels are 0 judges everything c: loss relu(1 - c) + relu(1 + c)."""
  x = jnp.zeros((1, 8, 8, 3))
  for judgement, loss in ((0.0, 2.0), (0.5, 2.0), (3.0, 4.0)):
    params = jax.tree.map(jnp.zeros_like, _discriminator(0))
    params["conv_out"]["bias"] = jnp.full((1,), judgement)
    assert float(train_vqgan.discriminator_loss(params, CONFIG, x, x)) == pytest.approx(loss)


def test_adversarial_step(images):
  """It moves the discriminator, and its gradient changes the VQGAN's step by weight times the judgement."""
  state = lambda: train_vqgan.init_state(CONFIG, NUM_CODES, 0)
  with_it, metrics = train_vqgan.train_step(state(), images[:8], CONFIG, True)
  without, _ = train_vqgan.train_step(state(), images[:8], CONFIG, False)
  assert set(metrics) == {"loss", "mse", "discriminator_loss"}
  _assert_same(without["discriminator"], state()["discriminator"])
  with pytest.raises(AssertionError):
    _assert_same(with_it["discriminator"], state()["discriminator"])
  with pytest.raises(AssertionError):
    _assert_same(with_it["params"]["decoder"], without["params"]["decoder"])
  params, x = state()["params"], vqgan.to_float(images)
  loss = lambda d: train_vqgan.generator_loss(params, d, CONFIG, NUM_CODES, x)
  alone, (y, _) = loss(None)
  judged = train_vqgan.judge(CONFIG, _discriminator(5), y).mean()
  assert abs(float(judged)) > 1e-3
  np.testing.assert_allclose(
    loss(_discriminator(5))[0], alone - CONFIG.adversarial_weight * judged, rtol=1e-5
  )


def test_batches_cover_an_epoch():
  epochs = [
    np.concatenate([train_vqgan.batch_indices(4 * e + i, 20, 5, 7) for i in range(4)])
    for e in (0, 1)
  ]
  assert [sorted(e) for e in epochs] == [list(range(20))] * 2
  assert (epochs[0] != epochs[1]).any()
  np.testing.assert_array_equal(train_vqgan.batch_indices(1, 20, 5, 7), epochs[0][5:10])


def test_perplexity_literals():
  assert train_vqgan.perplexity(np.array([[0, 1], [2, 3]]), 8) == pytest.approx(4)
  assert train_vqgan.perplexity(np.array([5, 5]), 8) == pytest.approx(1)


def test_too_few_images(images, tmp_path):
  with pytest.raises(UserError, match="only 7 training images"):
    train_vqgan.train(CONFIG, NUM_CODES, 0, images[:7], tmp_path)


def test_image_files_read_like_an_array(images, tmp_path):
  paths = [tmp_path / f"{i}.png" for i in range(4)]
  for path, image in zip(paths, images):
    Image.fromarray(image).save(path)
  files = train_vqgan.ImageFiles(paths, 8)
  assert len(files) == 4
  np.testing.assert_array_equal(files[np.array([2, 0])], images[[2, 0]])

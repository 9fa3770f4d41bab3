import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm3leon_jax.errors import UserError
from cm3leon_jax.files.json_files import read_json_lines
from cm3leon_jax.tokenizers import discriminator, losses, quantizers, vqgan
from cm3leon_jax.tokenizers.vqgan import ImageTokenizer
from cm3leon_jax.training.image_models import trainer, vqgan_measures, vqgan_training
from tests.models.tiny import mesh_of
from tests.refusals import refused
from tests.tokenizers.tiny import tiny_config

LEVELS = {"stem": 2, "multipliers": (1, 1), "encoder_blocks": (0, 0), "decoder_blocks": (0, 0)}
ADVERSARY = {"adversarial_weight": 0.1, "adversarial_start": 0.5}
ADVERSARY |= {"discriminator_width": 4, "discriminator_layers": 2}
LENGTH = {"steps": 12, "batch_size": 8, "restart_every": 4, "checkpoint_every": 5}
CONFIG = tiny_config(**LEVELS, **ADVERSARY, **LENGTH, learning_rate=3e-3)
NUM_CODES = 16


@pytest.fixture(scope="module")
def images():
  rng = np.random.default_rng(0)
  x = np.broadcast_to(rng.integers(0, 256, (20, 1, 1, 3)), (20, 8, 8, 3)).astype(np.uint8)
  x[:, 2:6, 2:6] //= 2
  return x


def _assert_same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def _discriminator(seed):
  return vqgan_training.init_state(CONFIG, NUM_CODES, seed)["discriminator"]


class Killed(Exception):
  """Raised in place of a kill during training."""


@dataclasses.dataclass
class KilledAfter:
  """Images that raise `Killed` after `reads_left` reads."""

  images: np.ndarray
  reads_left: int

  def __len__(self):
    return len(self.images)

  def __getitem__(self, indices):
    self.reads_left -= 1
    if self.reads_left < 0:
      raise Killed
    return self.images[indices]


def train(images, folder, seed=0, devices=1):
  with jax.set_mesh(mesh_of(1, devices, 1)):
    return vqgan_training.train(CONFIG, NUM_CODES, seed, images, folder, {})


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
  """Trains all steps on one device; returns the parameters and the loss of each step."""
  folder = tmp_path_factory.mktemp("whole")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(trainer, "LOG_EVERY", 1)
    params = train(images, folder).params
  return params, [line["loss"] for line in read_json_lines(folder / "metrics.jsonl")]


def test_resume_equals_uninterrupted(images, whole, tmp_path):
  with pytest.raises(Killed):
    train(KilledAfter(images, 11), tmp_path)
  rest = KilledAfter(images, 2)  # Runs only steps 10 and 11 again.
  _assert_same(train(rest, tmp_path).params, whole[0])
  other = train(images, tmp_path / "other", seed=1).params
  with pytest.raises(AssertionError):
    _assert_same(other, whole[0])


def test_training_improves_and_leaves_its_files(images, tmp_path):
  config = dataclasses.replace(CONFIG, steps=150, adversarial_weight=0.0, checkpoint_every=1_000)
  before = ImageTokenizer(
    config, NUM_CODES, vqgan_training.init_state(config, NUM_CODES, 0)["params"]
  )
  untrained = vqgan_measures.evaluate(before, images, images, tmp_path)
  with jax.set_mesh(mesh_of(1, 1, 1)):
    summary = vqgan_training.train_vqgan(config, NUM_CODES, 0, images, images[:6], tmp_path, {})
  assert summary["psnr_db"] > untrained["psnr_db"] + 4
  names = {"config.json", "metrics.jsonl", "params.safetensors", "training"}
  names |= {"reconstructions.npz", "reconstructions.png"}
  assert {path.name for path in tmp_path.iterdir()} == names
  shown = np.load(tmp_path / "reconstructions.npz")
  np.testing.assert_array_equal(shown["originals"], images[:6])
  tokenizer = ImageTokenizer.load(tmp_path)
  np.testing.assert_array_equal(
    shown["reconstructions"], tokenizer.decode(tokenizer.encode(images[:6]))
  )
  errors = ((shown["originals"] / 255 - shown["reconstructions"] / 255) ** 2).mean((1, 2, 3))
  assert summary["psnr_db"] == pytest.approx(np.mean(10 * np.log10(1 / errors)))
  assert summary["psnr_of_mean_mse_db"] == pytest.approx(10 * np.log10(1 / errors.mean()))


def test_measures_that_are_no_better_than_one_color(images, tmp_path):
  measures = {
    "psnr_of_mean_mse_db": 20.0, "psnr_of_one_color_db": 19.0,
    "codes_used": 1, "train_codes_used": 2,
  }  # fmt: skip
  vqgan_measures.check_learned(measures)
  with refused(UserError, "the same code", "config.vqgan.steps"):
    vqgan_measures.check_learned({**measures, "train_codes_used": 1})
  with refused(UserError, "worse (19.0 dB)", "19.0 dB"):
    vqgan_measures.check_learned({**measures, "psnr_of_mean_mse_db": 19.0})
  model = ImageTokenizer(
    CONFIG, NUM_CODES, vqgan_training.init_state(CONFIG, NUM_CODES, 0)["params"]
  )
  found = vqgan_measures.evaluate(model, images, images, tmp_path)["psnr_of_one_color_db"]
  error = ((images / 255 - (images / 255).mean((0, 1, 2))) ** 2).mean()
  assert found == pytest.approx(-10 * np.log10(error))


def test_only_dead_codes_restart_and_at_encodings(images):
  state = vqgan_training.init_state(CONFIG, NUM_CODES, 0)
  usage = np.arange(NUM_CODES) % 3
  state["usage"] = jnp.asarray(usage, jnp.int32)
  old, encoder = (
    np.asarray(state["params"]["codebook"]["table"]),
    jax.tree.map(np.asarray, state["params"]["encoder"]),
  )

  @jax.jit
  def encodings(params):
    model = vqgan.bind(CONFIG, NUM_CODES, params)
    return quantizers.l2_normalize(model.encoder(vqgan.to_float(images)))

  z = np.asarray(encodings(state["params"])).reshape(-1, 4)
  state = vqgan_training.restart_dead_codes(state, images, CONFIG, jax.random.key(3))
  new = np.asarray(state["params"]["codebook"]["table"])
  np.testing.assert_array_equal(new[usage > 0], old[usage > 0])
  to_encoding = np.abs(new[:, None] - z[None]).max(-1).min(-1)
  assert (to_encoding[usage == 0] < 1e-5).all()
  assert (to_encoding[usage > 0] > 1e-3).any()
  assert not state["usage"].any()
  _assert_same(state["params"]["encoder"], encoder)


def test_usage_counts_every_code(images):
  state, metrics = vqgan_training.train_step(
    vqgan_training.init_state(CONFIG, NUM_CODES, 0), images[:8], CONFIG, False
  )
  assert int(state["usage"].sum()) == 8 * CONFIG.image_tokens
  assert set(metrics) == {"loss", "mse", "perplexity", "codes_used"}


def test_generator_loss_is_the_oracle(images):
  """Compares four terms and their gradients with fp64 (van den Oord et al. 2017, section 3.2)."""
  weights = {"l1_weight": 0.5, "l2_weight": 0.9, "codebook_weight": 0.7, "commitment_weight": 0.3}
  config, x = dataclasses.replace(CONFIG, **weights), vqgan.to_float(images)
  params = vqgan_training.init_state(CONFIG, NUM_CODES, 0)["params"]

  @functools.partial(jax.jit, static_argnums=1)
  def gradients(params, config):
    def loss(p):
      return losses.generator_loss(p, None, config, NUM_CODES, x)

    return *jax.value_and_grad(loss, has_aux=True)(params), vqgan.bind(config, NUM_CODES, params)(x)

  (loss, _), _, (y, z, q, indices) = gradients(params, config)
  error, distance = np.float64(y) - np.float64(x), np.square(np.float64(q) - np.float64(z)).sum(-1)
  expected = 0.9 * np.square(error).mean() + 0.5 * np.abs(error).mean() + distance.mean()
  np.testing.assert_allclose(loss, expected, rtol=1e-5)

  def codebook_loss(table):
    return 0.7 * jnp.mean(jnp.sum((quantizers.l2_normalize(table)[indices] - z) ** 2, -1))

  def commitment_loss(encoder):
    model = vqgan.bind(CONFIG, NUM_CODES, {**params, "encoder": encoder})
    return 0.3 * jnp.mean(jnp.sum((quantizers.l2_normalize(model.encoder(x)) - q) ** 2, -1))

  _, found, _ = gradients(params, dataclasses.replace(config, l1_weight=0.0, l2_weight=0.0))
  table = jax.jit(jax.grad(codebook_loss))(params["codebook"]["table"])
  assert np.abs(table).max() > 1e-2
  np.testing.assert_allclose(found["codebook"]["table"], table, rtol=1e-4, atol=1e-6)
  encoder = jax.jit(jax.grad(commitment_loss))(params["encoder"])
  assert np.abs(encoder["conv_out"]["kernel"]).max() > 1e-2
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), found["encoder"], encoder
  )


def _at_count(opt_state, count):
  """Returns an optimizer state whose step count is `count`."""
  return jax.tree.map(lambda x: np.full_like(x, count) if x.dtype == np.int32 else x, opt_state)


@pytest.mark.parametrize(
  ("network", "opt_state", "steps"),
  [("params", "opt_state", 12), ("discriminator", "discriminator_opt_state", 6)],
)
def test_the_learning_rate_ends_at_0(images, network, opt_state, steps):
  """The discriminator starts after half of the steps, and has its own step count."""
  for count, moves in ((steps - 1, True), (steps, False)):
    state = vqgan_training.init_state(CONFIG, NUM_CODES, 0)
    state[opt_state] = _at_count(state[opt_state], count)
    old = jax.tree.map(np.array, state[network])
    state, _ = vqgan_training.train_step(state, images[:8], CONFIG, True)
    changes = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - b).max(), state[network], old)
    assert (max(jax.tree.leaves(changes)) > 1e-6) == moves


def test_hinge_loss_literals():
  """If kernels are 0 and the last bias is c, the loss is relu(1 - c) + relu(1 + c)."""
  x = np.zeros((1, 8, 8, 3), np.float32)
  for judgment, loss in ((0.0, 2.0), (0.5, 2.0), (3.0, 4.0)):
    params = jax.tree.map(np.zeros_like, _discriminator(0))
    params["conv_out"]["bias"] = np.float32([judgment])
    found = jax.jit(discriminator.hinge_loss, static_argnums=1)(params, CONFIG, x, x)
    assert float(found) == pytest.approx(loss)


def test_adversarial_step(images):
  """The discriminator is trained, and its weighted output is a term of the VQGAN's loss."""
  state = functools.partial(vqgan_training.init_state, CONFIG, NUM_CODES, 0)
  with_it, metrics = vqgan_training.train_step(state(), images[:8], CONFIG, True)
  without, _ = vqgan_training.train_step(state(), images[:8], CONFIG, False)
  assert set(metrics) == {"loss", "mse", "perplexity", "codes_used", "discriminator_loss"}
  _assert_same(without["discriminator"], state()["discriminator"])
  with pytest.raises(AssertionError):
    _assert_same(with_it["discriminator"], state()["discriminator"])
  with pytest.raises(AssertionError):
    _assert_same(with_it["params"]["decoder"], without["params"]["decoder"])
  params, x = state()["params"], vqgan.to_float(images)

  @jax.jit
  def loss(discriminator):
    return losses.generator_loss(params, discriminator, CONFIG, NUM_CODES, x)

  alone, (y, *_) = loss(None)
  scores = jax.jit(discriminator.scores, static_argnums=0)
  score = scores(CONFIG, _discriminator(5), y).mean()
  assert abs(float(score)) > 1e-3
  np.testing.assert_allclose(
    loss(_discriminator(5))[0], alone - CONFIG.adversarial_weight * score, rtol=1e-5
  )


def test_perplexity_literals():
  assert vqgan_measures.perplexity(np.array([[0, 1], [2, 3]]), 8) == pytest.approx(4)
  assert vqgan_measures.perplexity(np.array([5, 5]), 8) == pytest.approx(1)

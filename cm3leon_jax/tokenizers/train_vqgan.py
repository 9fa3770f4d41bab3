"""Training of the image tokenizer: losses, the step, dead codes and held-out numbers."""

# B batch, H height, W width, h and w of the code grid, E code width, K codes, n images.

from collections.abc import Mapping
import functools
import math
import time

from etils import epath
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from cm3leon_jax import parameters
from cm3leon_jax.config import UserError
from cm3leon_jax.io import replacing
from cm3leon_jax.tokenizers import quantizers, vqgan
from cm3leon_jax.tokenizers.vqgan import ImageTokenizer, VQGANConfig
from cm3leon_jax.training import small_trainer

RECONSTRUCTIONS = "reconstructions.npz"
NUM_RECONSTRUCTIONS = 32
NUM_TRAIN_MEASURED = 1_024
MAX_HELDOUT = 4_096


class Discriminator(nnx.Module):
  """Judges patches (Isola et al. 2017): pixels [B, H, W, 3] -> [B, h, w], positive if real."""

  def __init__(self, config: VQGANConfig, rngs: nnx.Rngs):
    widths = [config.discriminator_width * 2**i for i in range(config.discriminator_layers)]
    self.layers = nnx.List(
      vqgan.conv(a, b, 4, rngs, stride=2) for a, b in zip([3, *widths], widths)
    )
    self.conv_out = vqgan.conv(widths[-1], 1, 3, rngs)

  def __call__(self, x):
    for i, layer in enumerate(self.layers):
      x = layer(x)
      x = nnx.leaky_relu(vqgan.normalize(x) if i else x, 0.2)
    return self.conv_out(x)[..., 0]


@functools.cache
def _discriminator(config: VQGANConfig):
  return parameters.structure(lambda: Discriminator(config, nnx.Rngs(params=0)))


def judge(config: VQGANConfig, params: dict, x):
  """Applies the discriminator to pixels: [B, H, W, 3] -> [B, h, w] of its last layer."""
  return parameters.fill(*_discriminator(config), params)(x)


def generator_loss(
  params: dict, discriminator: dict | None, config: VQGANConfig, num_codes: int, x
):
  """Computes the loss of the VQGAN: reconstruction, codebook and commitment loss.

  A discriminator adds its mean judgement of the reconstructions, negated.

  Args:
    params: parameters of the VQGAN.
    discriminator: parameters of the discriminator, or None.
    config: holds the weights.
    num_codes: K.
    x: pixels in [-1, 1], [B, H, W, 3].

  Returns:
    fp32 scalar, (reconstruction [B, H, W, 3], encodings [B, h, w, E], indices int32 [B, h, w]).
  """
  y, z, q, indices = vqgan.bind(config, num_codes, params)(x)
  loss = config.l2_weight * jnp.mean((y - x) ** 2) + config.l1_weight * jnp.mean(jnp.abs(y - x))
  loss += quantizers.loss(config.quantizer, config.codebook_weight, config.commitment_weight, z, q)
  if discriminator is not None:
    loss -= config.adversarial_weight * judge(config, discriminator, y).mean()
  return loss, (y, z, indices)


def discriminator_loss(params: dict, config: VQGANConfig, x, y):
  """Computes the hinge loss of judgements of images x and reconstructions y, [B, H, W, 3].

  Judgements of x above 1, and of y below -1, cost nothing.
  """
  return jnp.mean(nnx.relu(1 - judge(config, params, x))) + jnp.mean(
    nnx.relu(1 + judge(config, params, y))
  )


def adversarial_from(config: VQGANConfig) -> int:
  """Returns the first step in which the discriminator takes part."""
  return math.ceil(config.adversarial_start * config.steps)


def optimizer(config: VQGANConfig, num_steps: int) -> optax.GradientTransformation:
  """Makes Adam with a warmup and one cosine to 0 over its `num_steps` steps."""
  warmup = min(config.warmup_steps, num_steps // 10)
  return optax.adam(
    optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, warmup, num_steps)
  )


def discriminator_optimizer(config: VQGANConfig) -> optax.GradientTransformation:
  """Makes the discriminator's Adam, whose steps count from `adversarial_from` on."""
  return optimizer(config, max(1, config.steps - adversarial_from(config)))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def init_state(config: VQGANConfig, num_codes: int, seed: int) -> dict:
  """Initializes the state of training.

  Returns:
    params and opt_state of the VQGAN; usage, int32 [K], the number of times that each code was used
    since the last restart; with a positive adversarial weight, discriminator and
    discriminator_opt_state; averages of the codes of `ema`, see `quantizers.init_averages`.
  """
  key, discriminator_key = jax.random.split(jax.random.key(seed))
  params = vqgan.init_params(config, num_codes, key)
  state = {
    "params": params,
    "opt_state": optimizer(config, config.steps).init(params),
    "usage": jnp.zeros(num_codes, jnp.int32),
  }
  if config.adversarial_weight:
    state["discriminator"] = vqgan.random_params(_discriminator(config)[1], discriminator_key)
    state["discriminator_opt_state"] = discriminator_optimizer(config).init(state["discriminator"])
  if config.quantizer == "ema":
    state["averages"] = quantizers.init_averages(params["codebook"]["table"])
  return state


@functools.partial(jax.jit, static_argnums=(2, 3), donate_argnums=0)
def train_step(state: dict, images, config: VQGANConfig, adversarial: bool) -> tuple[dict, dict]:
  """Takes one step of the VQGAN and, if `adversarial`, of the discriminator on the same images.

  Args:
    state: of `init_state`; donated.
    images: uint8 [B, H, W, 3].
    config: of the VQGAN.
    adversarial: whether the discriminator takes part.

  Returns:
    The new state; metrics: loss and mse (of pixels in [-1, 1]), discriminator_loss if adversarial.
  """
  state, x, tx = dict(state), vqgan.to_float(images), optimizer(config, config.steps)
  num_codes = state["usage"].shape[0]
  discriminator = state["discriminator"] if adversarial else None
  gradient = jax.value_and_grad(generator_loss, has_aux=True)
  (loss, (y, z, indices)), grads = gradient(state["params"], discriminator, config, num_codes, x)
  metrics = {"loss": loss, "mse": jnp.mean((y - x) ** 2)}
  state["params"], state["opt_state"] = _update(tx, grads, state["opt_state"], state["params"])
  if adversarial:
    loss, grads = jax.value_and_grad(discriminator_loss)(
      discriminator, config, x, jax.lax.stop_gradient(y)
    )
    metrics["discriminator_loss"] = loss
    old = state["discriminator_opt_state"]
    state["discriminator"], state["discriminator_opt_state"] = _update(
      discriminator_optimizer(config), grads, old, discriminator
    )
  if "averages" in state:
    state["averages"] = quantizers.update_averages(state["averages"], z, indices)
    table = quantizers.averaged_table(state["averages"], state["params"]["codebook"]["table"])
    state["params"] = {**state["params"], "codebook": {"table": table}}
  state["usage"] = state["usage"] + jnp.bincount(indices.ravel(), length=num_codes)
  return state, metrics


def _update(tx, grads, opt_state, params):
  updates, opt_state = tx.update(grads, opt_state, params)
  return optax.apply_updates(params, updates), opt_state


@functools.partial(jax.jit, static_argnums=2, donate_argnums=0)
def restart_dead_codes(state: dict, images, config: VQGANConfig, key) -> dict:
  """Moves codes that were not used since the last restart to random encodings; resets `usage`.

  Args:
    state: of `init_state`; donated.
    images: uint8 [B, H, W, 3].
    config: of the VQGAN.
    key: of the choice.
  """
  table, usage = state["params"]["codebook"]["table"], state["usage"]
  model = vqgan.bind(config, len(usage), state["params"])
  z = model.codebook.prepare(model.encoder(vqgan.to_float(images))).reshape(-1, config.code_dim)
  chosen = z[jax.random.randint(key, (len(usage),), 0, len(z))]
  dead = (usage == 0)[:, None]
  params = {**state["params"], "codebook": {"table": jnp.where(dead, chosen, table)}}
  state = {**state, "params": params, "usage": jnp.zeros_like(usage)}
  if "averages" in state:
    counts, sums = state["averages"]["counts"], state["averages"]["sums"]
    state["averages"] = {
      "counts": jnp.where(dead[:, 0], 1.0, counts), "sums": jnp.where(dead, chosen, sums)
    }  # fmt: skip
  return state


def restarts(config: VQGANConfig, done: int) -> bool:
  """Returns whether dead codes restart after `done` steps."""
  if config.quantizer not in quantizers.RESTARTING or not config.restart_every:
    return False
  return done < config.restart_until * config.steps and done % config.restart_every == 0


def train(
  config: VQGANConfig,
  num_codes: int,
  seed: int,
  images,
  folder: epath.PathLike,
  inputs: Mapping[str, str],
) -> ImageTokenizer:
  """Trains all steps, or the remaining ones of a killed run; see `small_trainer.train`.

  Args:
    config: of the VQGAN.
    num_codes: K.
    seed: of parameters, order of the images and restarts.
    images: uint8 [n, H, W, 3], or an object with the same indexing, e.g. `raw_pairs.ImageFiles`.
    folder: gets metrics and checkpoints.
    inputs: ids of the stages that the images come from, see `stages.inputs`.
  """

  def step(state, batch, i):
    adversarial = config.adversarial_weight > 0 and i >= adversarial_from(config)
    state, metrics = train_step(state, batch, config, adversarial)
    done = i + 1
    if restarts(config, done):
      key = jax.random.fold_in(jax.random.key(seed + 1), done)
      state = restart_dead_codes(state, batch, config, key)
    return state, metrics

  init = functools.partial(init_state, config, num_codes, seed)
  about = {"num_codes": num_codes, "inputs": inputs}
  state = small_trainer.train("vqgan", config, about, seed, images, folder, init, step)
  return ImageTokenizer(config, num_codes, jax.device_put(state["params"]))


def mean_squared_errors(images: np.ndarray, reconstructions: np.ndarray) -> np.ndarray:
  """Computes the mean squared error of each image, pixels in [0, 1]: fp64 [n].

  The PSNR is -10 log10 of it.
  """
  return np.mean((images.astype(np.float64) - reconstructions) ** 2, axis=(1, 2, 3)) / 255**2


def perplexity(codes: np.ndarray, num_codes: int) -> float:
  """Computes exp(entropy) of the codes: 1 if all are one code, K if all K are equally frequent."""
  p = np.bincount(codes.ravel(), minlength=num_codes) / codes.size
  return float(np.exp(-np.sum(p * np.log(np.where(p > 0, p, 1)))))


def evaluate(tokenizer: ImageTokenizer, images, train_images, folder: epath.PathLike) -> dict:
  """Measures held-out `images` (at most 4,096) and the codes of 1,024 training images.

  Writes reconstructions.npz.

  Returns:
    psnr_db: mean PSNR of the images; psnr_of_mean_mse_db: PSNR of the mean squared error of all;
    psnr_of_one_color_db: the latter, if every image were reconstructed as the mean color of all;
    codebook_perplexity and codes_used (held-out), and the same with prefix train_; bits_per_image:
    of training codes whose frequencies are known, the start of a decoder.
  """
  images = images[np.arange(min(len(images), MAX_HELDOUT))]
  codes = tokenizer.encode(images)
  reconstructions = tokenizer.decode(codes)
  train_codes = tokenizer.encode(
    train_images[_evenly_spaced(len(train_images), NUM_TRAIN_MEASURED)]
  )
  shown = _evenly_spaced(len(images), NUM_RECONSTRUCTIONS)
  with replacing(epath.Path(folder) / RECONSTRUCTIONS) as file:
    np.savez_compressed(file, originals=images[shown], reconstructions=reconstructions[shown])
  errors = np.maximum(mean_squared_errors(images, reconstructions), 1e-10)
  one_color = np.broadcast_to(images.mean((0, 1, 2)), images.shape)
  color_error = max(mean_squared_errors(images, one_color).mean(), 1e-10)
  train_perplexity = perplexity(train_codes, tokenizer.num_codes)
  return {
    "psnr_db": float(np.mean(-10 * np.log10(errors))),
    "psnr_of_mean_mse_db": float(-10 * np.log10(errors.mean())),
    "psnr_of_one_color_db": float(-10 * np.log10(color_error)),
    "codebook_perplexity": perplexity(codes, tokenizer.num_codes),
    "codes_used": len(np.unique(codes)),
    "train_codebook_perplexity": train_perplexity,
    "train_codes_used": len(np.unique(train_codes)),
    "bits_per_image": math.log2(train_perplexity) * tokenizer.config.image_tokens,
  }


def check_learned(measures: dict) -> None:
  """Raises UserError if a VQGAN is of no use, by the measures of `evaluate`."""
  found, color = measures["psnr_of_mean_mse_db"], measures["psnr_of_one_color_db"]
  if measures["codes_used"] == measures["train_codes_used"] == 1:
    what = "gives every image the same code"
  elif not found > color:
    what = f"reconstructs held-out images worse ({found:.1f} dB) than one color ({color:.1f} dB)"
  else:
    return
  raise UserError(
    f"the image tokenizer {what}: train it longer (config.vqgan.steps) or with another "
    "config.vqgan.learning_rate."
  )


def _evenly_spaced(length: int, count: int) -> np.ndarray:
  return np.unique(np.linspace(0, length - 1, count).astype(int))


def train_vqgan(
  config: VQGANConfig,
  num_codes: int,
  seed: int,
  images,
  heldout_images,
  folder: epath.PathLike,
  inputs: Mapping[str, str],
) -> dict:
  """Runs the stage on the current mesh: trains, writes the tokenizer, returns its measures.

  The checkpoints stay, unless the tokenizer is refused: the caller deletes them when the stage is
  finished. For the arguments, see `train`.

  Raises:
    UserError: the training diverged, or the tokenizer is of no use (`check_learned`).
  """
  start = time.time()
  tokenizer = train(config, num_codes, seed, images, folder, inputs)
  seconds = time.time() - start
  tokenizer.save(folder)
  measures = evaluate(tokenizer, heldout_images, images, folder)
  with small_trainer.deleted_if_refused(folder):
    check_learned(measures)
  return {**measures, "steps": config.steps, "seconds": round(seconds, 1)}

"""Trains the image tokenizer, and restarts dead codes."""

# B batch, H height, W width, h and w of the code grid, E code width, K codes, n images.

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import math
import time
from typing import TypeAlias

from etils import epath
import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, UInt8
import numpy as np
import optax

from cm3leon_jax.config.tokenizers import VQGANConfig
from cm3leon_jax.tokenizers import discriminator as discriminator_lib
from cm3leon_jax.tokenizers import losses, vqgan
from cm3leon_jax.tokenizers.vqgan import ImageTokenizer
from cm3leon_jax.training.image_models import trainer, vqgan_watch
from cm3leon_jax.training.image_models.vqgan_measures import (
  ImageRows,
  check_learned,
  evaluate,
  evenly_spaced,
)
from cm3leon_jax.training.step.optimizer import update_average

Images: TypeAlias = UInt8[Array, "B H W 3"] | UInt8[np.ndarray, "B H W 3"]
GOOD_DB = 20.0  # An installed tokenizer with this PSNR on held-out images is used as it is.
# Otherwise its decoder is trained on, for this share of the config's steps, which are estimated for
# a smaller network, and with this share of its learning rate.
TUNED_STEPS, TUNED_RATE = 1 / 4, 1 / 4


def adversarial_from(config: VQGANConfig) -> int:
  """Returns the first step (from 0) that uses the discriminator."""
  return math.ceil(config.adversarial_start * config.steps)


def optimizer(config: VQGANConfig, num_steps: int) -> optax.GradientTransformation:
  """Creates Adam with warm-up and a cosine decay to 0 over `num_steps` steps."""
  warmup = min(config.warmup_steps, num_steps // 10)
  return optax.adam(
    optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, warmup, num_steps)
  )


def discriminator_optimizer(config: VQGANConfig) -> optax.GradientTransformation:
  """Creates the discriminator's Adam, whose schedule begins at step `adversarial_from`."""
  return optimizer(config, max(1, config.steps - adversarial_from(config)))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def init_state(config: VQGANConfig, num_codes: int, seed: int) -> dict:
  """Initializes the state of a VQGAN training.

  Returns:
    A dict with
      params, opt_state: parameters and optimizer state of the VQGAN.
      usage: int32 [K], how often each code was used since the last restart.
      discriminator, discriminator_opt_state: if the adversarial weight is positive.
      ema, ema_steps: average of params and its number of steps, if `ema_decay` is positive.
  """
  key, discriminator_key = jax.random.split(jax.random.key(seed))
  params = vqgan.init_params(config, num_codes, key)
  state = {
    "params": params,
    "opt_state": optimizer(config, config.steps).init(params),
    "usage": jnp.zeros(num_codes, jnp.int32),
  }
  if config.adversarial_weight:
    state["discriminator"] = discriminator_lib.init_params(config, discriminator_key)
    state["discriminator_opt_state"] = discriminator_optimizer(config).init(state["discriminator"])
  if config.ema_decay:
    state |= {"ema": jax.tree.map(jnp.copy, params), "ema_steps": jnp.zeros((), jnp.int32)}
  return state


@functools.partial(jax.jit, static_argnums=(2, 3), donate_argnums=0)
def train_step(
  state: dict,
  images: Images,
  config: VQGANConfig,
  adversarial: bool,
  features: dict | None = None,
) -> tuple[dict, dict]:
  """Updates the VQGAN and, if `adversarial`, the discriminator on the same images.

  With `config.source`, only the decoder of the VQGAN changes, so that codes stay as they are.

  Args:
    state: state as in `init_state`; donated.
    images: uint8 [B, H, W, 3].
    features: result of `perceptual.make_params`; needed if `perceptual_weight` is positive.

  Returns:
    The new state, and metrics of the batch: loss, mse (of pixels in [-1, 1]), perplexity and
    codes_used. If `adversarial`, also discriminator_loss, and adversarial_weight if it is adaptive.
  """
  state, x, tx = dict(state), vqgan.to_float(images), optimizer(config, config.steps)
  num_codes = state["usage"].shape[0]
  discriminator = state["discriminator"] if adversarial else None
  gradient = jax.value_and_grad(losses.generator_loss, has_aux=True)
  (loss, made), grads = gradient(state["params"], discriminator, config, num_codes, x, features)
  if config.source:
    grads = {**jax.tree.map(jnp.zeros_like, grads), "decoder": grads["decoder"]}
  y, _, indices, adaptive = made
  metrics = {"loss": loss, "mse": jnp.mean((y - x) ** 2)}
  state["params"], state["opt_state"] = _update(tx, grads, state["opt_state"], state["params"])
  if adversarial:
    loss, grads = jax.value_and_grad(discriminator_lib.hinge_loss)(
      discriminator, config, x, jax.lax.stop_gradient(y)
    )
    metrics["discriminator_loss"] = loss
    if config.adversarial_adaptive:
      metrics["adversarial_weight"] = config.adversarial_weight * adaptive
    old = state["discriminator_opt_state"]
    state["discriminator"], state["discriminator_opt_state"] = _update(
      discriminator_optimizer(config), grads, old, state["discriminator"]
    )
  if "ema" in state:
    average, steps = state["ema"], state["ema_steps"]
    state["ema"] = update_average(average, state["params"], config.ema_decay, steps)
    state["ema_steps"] = steps + 1
  counts = jnp.bincount(indices.ravel(), length=num_codes)
  state["usage"] = state["usage"] + counts
  shares = counts / indices.size
  entropy = -jnp.sum(shares * jnp.log(jnp.where(counts > 0, shares, 1)))
  metrics |= {"perplexity": jnp.exp(entropy), "codes_used": jnp.sum(counts > 0)}
  return trainer.keep_layout(state), metrics


def _update(
  tx: optax.GradientTransformation, grads: dict, opt_state: optax.OptState, params: dict
) -> tuple[dict, optax.OptState]:
  updates, opt_state = tx.update(grads, opt_state, params)
  return optax.apply_updates(params, updates), opt_state


@functools.partial(jax.jit, static_argnums=2, donate_argnums=0)
def restart_dead_codes(
  state: dict, images: Images, config: VQGANConfig, key: Key[Array, ""]
) -> dict:
  """Replaces codes that have not been used since the last restart, and resets `usage`.

  The new codes are drawn at random from the encodings of `images`, uint8 [B, H, W, 3]. `state` is
  described in `init_state`, and is donated.
  """
  usage = state["usage"]
  model = vqgan.bind(config, len(usage), state["params"])
  z = model.codebook.prepare(model.encoder(vqgan.to_float(images))).reshape(-1, config.code_dim)
  chosen = z[jax.random.randint(key, (len(usage),), 0, len(z))]

  def restarted(params: dict) -> dict:
    table = jnp.where((usage == 0)[:, None], chosen, params["codebook"]["table"])
    return {**params, "codebook": {"table": table}}

  state = {**state, "params": restarted(state["params"]), "usage": jnp.zeros_like(usage)}
  if "ema" in state:  # The average would otherwise retain the dead codes for many steps.
    state["ema"] = restarted(state["ema"])
  return trainer.keep_layout(state)


def restarts(config: VQGANConfig, done: int) -> bool:
  """Returns whether to replace dead codes after `done` steps."""
  if config.quantizer == "fsq" or config.source or not config.restart_every:
    return False
  return done < config.restart_until * config.steps and done % config.restart_every == 0


def train(
  config: VQGANConfig,
  num_codes: int,
  seed: int,
  images: ImageRows,
  folder: epath.PathLike,
  inputs: Mapping[str, str],
  features: dict | None = None,
  shown: np.ndarray | None = None,
  open_boards: Callable[[int], Sequence] = lambda first_step: (),
  start: ImageTokenizer | None = None,
) -> ImageTokenizer:
  """Trains the VQGAN for all steps, or the remaining steps of a killed run; see `trainer.train`.

  Args:
    inputs: ids of the stages that the images come from, see `stages.inputs`, and the digest of the
      file that contains `features`.
    features: result of `perceptual.make_params`; needed if `perceptual_weight` is positive.
    shown: held-out images to show with their reconstructions, uint8 [n, H, W, 3].
    open_boards: maps the first step of this start to open boards, see `watch.boards.Board`.
    start: tokenizer from whose parameters the training starts; None: random parameters.

  Raises:
    ValueError: `features` are given although `perceptual_weight` is 0, or vice versa.
    UserError: see `trainer.train`.
  """
  if bool(config.perceptual_weight) != (features is not None):
    raise ValueError("features must be given if, and only if, perceptual_weight is positive.")
  features = trainer.replicated(features)

  def step(state: dict, batch: Images, i: int) -> tuple[dict, dict]:
    adversarial = config.adversarial_weight > 0 and i >= adversarial_from(config)
    state, metrics = train_step(state, batch, config, adversarial, features)
    done = i + 1
    if restarts(config, done):
      key = jax.random.fold_in(jax.random.key(seed + 1), done)
      state = restart_dead_codes(state, batch, config, key)
    return state, metrics

  def reconstruct(state: dict, some: np.ndarray) -> np.ndarray:
    tokenizer = trained(config, num_codes, state)
    return tokenizer.decode(tokenizer.encode(some))

  def init() -> dict:
    state = init_state(config, num_codes, seed)
    if start is not None:
      copy = jax.jit(functools.partial(jax.tree.map, jnp.copy))  # One program, not one per shape.
      return {**state, **{name: copy(start.params) for name in {"params", "ema"} & state.keys()}}
    return state

  about = {"num_codes": num_codes, "inputs": inputs}
  watch = vqgan_watch.Watch(folder, open_boards, reconstruct, shown)
  training = trainer.SmallTraining("vqgan", config, about, seed, images, folder, init, step, watch)
  return trained(config, num_codes, trainer.train(training))


def trained(config: VQGANConfig, num_codes: int, state: dict) -> ImageTokenizer:
  """Returns the tokenizer of a state, with averaged parameters if the state has them."""
  params = jax.device_get(state.get("ema", state["params"]))  # Training may have sharded them.
  return ImageTokenizer(config, num_codes, jax.device_put(params))


def tuning_config(config: VQGANConfig, start: VQGANConfig) -> VQGANConfig:
  """Returns the config that trains the decoder of a tokenizer `start` on, in a run of `config`."""
  return dataclasses.replace(
    start,
    source=config.source,
    resolution=config.resolution,
    steps=max(1, round(TUNED_STEPS * config.steps)),
    learning_rate=TUNED_RATE * start.learning_rate,
    batch_size=config.batch_size,
    checkpoint_every=config.checkpoint_every,
  )


def train_vqgan(
  config: VQGANConfig,
  num_codes: int,
  seed: int,
  images: ImageRows,
  heldout_images: ImageRows,
  folder: epath.PathLike,
  inputs: Mapping[str, str],
  features: dict | None = None,
  open_boards: Callable[[int], Sequence] = lambda first_step: (),
  installed: ImageTokenizer | None = None,
) -> dict:
  """Runs the stage on the current mesh: trains and writes the tokenizer. Returns its measures.

  The caller deletes the checkpoints after the stage is finished. The arguments are described in
  `train`. With `installed`, the tokenizer `config.source`, nothing is trained if it suits the
  held-out images (`GOOD_DB`), else only its decoder, and the better of the two is written.

  Raises:
    UserError: the training diverged, or `check_learned` rejects the tokenizer.
  """
  start = time.monotonic()
  before = {"psnr_db": -math.inf}
  if installed is not None:
    before = evaluate(installed, heldout_images, images, folder)
    found = f"reconstructions: the image tokenizer {config.source} reconstructs held-out images "
    found += f"with {before['psnr_db']:.1f} dB"
    if before["psnr_db"] >= GOOD_DB:
      print(f"{found}, so nothing is trained.", flush=True)
      installed.save(folder)
      return {**before, "steps": 0, "seconds": round(time.monotonic() - start, 1)}
    assert isinstance(installed.config, VQGANConfig)
    config = tuning_config(config, installed.config)
    print(
      f"{found}, fewer than {GOOD_DB:g}, so its decoder is trained on for {config.steps:,} steps, "
      "and its codes stay; --own_image_tokenizer or, without a base, --config.vqgan.source= trains "
      "a tokenizer from scratch.",
      flush=True,
    )
  shown = heldout_images[evenly_spaced(len(heldout_images), vqgan_watch.SHOWN)]
  tokenizer = train(
    config, num_codes, seed, images, folder, inputs, features, shown, open_boards, installed
  )
  seconds = time.monotonic() - start
  measures = evaluate(tokenizer, heldout_images, images, folder)
  if installed is not None and measures["psnr_db"] < before["psnr_db"]:
    tokenizer, measures = installed, evaluate(installed, heldout_images, images, folder)
  tokenizer.save(folder)
  check_learned(measures)
  return {**measures, "steps": config.steps, "seconds": round(seconds, 1)}

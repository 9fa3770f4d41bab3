"""Training of the image tokenizer: losses, the step, dead codes, the loop and its held-out numbers."""

# B batch, H height, W width, E code width, K codes, n images.

import dataclasses
import functools
import json
import time

from etils import epath
from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
from safetensors import SafetensorError
from safetensors import numpy as safetensors
from tqdm import tqdm

from cm3leon_jax import stages
from cm3leon_jax.config import UserError
from cm3leon_jax.data import raw_pairs
from cm3leon_jax.io import plain
from cm3leon_jax.tokenizers import vqgan
from cm3leon_jax.tokenizers.vqgan import ImageTokenizer, VQGANConfig

CHECKPOINT = "training_state.safetensors"
RECONSTRUCTIONS = "reconstructions.npz"
NUM_RECONSTRUCTIONS = 32
NUM_TRAIN_MEASURED = 1_024
MAX_HELDOUT = 4_096
IN_MEMORY_BYTES = 2**31
LOG_EVERY = 10


@dataclasses.dataclass(frozen=True)
class ImageFiles:
  """Images that stay on disk: `files[indices]` reads uint8 [n, H, W, 3], as indexing an array of all of them would."""

  paths: list
  resolution: int
  num_threads: int = 8

  def __len__(self) -> int:
    return len(self.paths)

  def __getitem__(self, indices: np.ndarray) -> np.ndarray:
    return raw_pairs.load_images(
      [self.paths[i] for i in indices], self.resolution, self.num_threads
    )


def open_images(folder: epath.PathLike, split: str, resolution: int) -> np.ndarray | ImageFiles:
  """Images of one split of a raw folder, in the order of its pairs: in memory if they fit in 2 GiB, else on disk.

  Raises:
    UserError: the split is empty, or an image cannot be read.
  """
  files = ImageFiles([pair.image for pair in raw_pairs.read_pairs(folder, split)], resolution)
  if not len(files):
    raise UserError(
      f"{folder} has no {split} pairs: the tokenizer needs some of both splits (config.raw.heldout_fraction)."
    )
  small = len(files) * resolution**2 * 3 <= IN_MEMORY_BYTES
  return files[np.arange(len(files))] if small else files


class Discriminator(nnx.Module):
  """Judges patches (Isola et al. 2017): pixels [B, H, W, 3] -> [B, h, w], positive where it takes them for real."""

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
  return nnx.split(nnx.eval_shape(lambda: Discriminator(config, nnx.Rngs(params=0))))


def judge(config: VQGANConfig, params: dict, x):
  """The discriminator's judgement of pixels [B, H, W, 3]: [B, h, w]."""
  return vqgan.fill(*_discriminator(config), params)(x)


def generator_loss(
  params: dict, discriminator: dict | None, config: VQGANConfig, num_codes: int, x
):
  """What the VQGAN minimises: reconstruction, codebook, commitment and, given a discriminator, deceiving it.

  Args:
    params: of the VQGAN.
    discriminator: parameters of the discriminator, or None.
    config: holds the weights.
    num_codes: K.
    x: pixels in [-1, 1], [B, H, W, 3].

  Returns:
    fp32 scalar, (reconstruction [B, H, W, 3], indices int32 [B, h, w]).
  """
  y, z, q, indices = vqgan.bind(config, num_codes, params)(x)
  stop, squared = jax.lax.stop_gradient, lambda a: jnp.mean(jnp.sum(a * a, -1))
  loss = config.l2_weight * jnp.mean((y - x) ** 2) + config.l1_weight * jnp.mean(jnp.abs(y - x))
  loss += config.codebook_weight * squared(q - stop(z)) + config.commitment_weight * squared(
    z - stop(q)
  )
  if discriminator is not None:
    loss -= config.adversarial_weight * judge(config, discriminator, y).mean()
  return loss, (y, indices)


def discriminator_loss(params: dict, config: VQGANConfig, x, y):
  """Hinge loss: judgements above 1 of images x, and below -1 of reconstructions y, cost nothing."""
  return jnp.mean(nnx.relu(1 - judge(config, params, x))) + jnp.mean(
    nnx.relu(1 + judge(config, params, y))
  )


def optimizer(config: VQGANConfig) -> optax.GradientTransformation:
  """Adam under one warmup and cosine over all steps, for the VQGAN and for the discriminator."""
  warmup = min(config.warmup_steps, config.steps // 10)
  return optax.adam(
    optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, warmup, config.steps)
  )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def init_state(config: VQGANConfig, num_codes: int, seed: int) -> dict:
  """Everything that training goes on from.

  Returns:
    step: int32, steps done. params, opt_state: of the VQGAN. usage: int32 [K], how often each code was used since the last
    restart. If the adversarial weight is positive, discriminator and discriminator_opt_state.
  """
  key, discriminator_key = jax.random.split(jax.random.key(seed))
  params = vqgan.init_params(config, num_codes, key)
  tx = optimizer(config)
  state = {
    "step": jnp.int32(0),
    "params": params,
    "opt_state": tx.init(params),
    "usage": jnp.zeros(num_codes, jnp.int32),
  }
  if config.adversarial_weight:
    state["discriminator"] = vqgan.draw_params(_discriminator(config)[1], discriminator_key)
    state["discriminator_opt_state"] = tx.init(state["discriminator"])
  return state


@functools.partial(jax.jit, static_argnums=(2, 3), donate_argnums=0)
def train_step(state: dict, images, config: VQGANConfig, adversarial: bool) -> tuple[dict, dict]:
  """One step of the VQGAN and, if `adversarial`, one of the discriminator against the same reconstructions.

  Args:
    state: of `init_state`; donated.
    images: uint8 [B, H, W, 3].
    config: of the VQGAN.
    adversarial: whether the discriminator takes part.

  Returns:
    The new state; metrics: loss and mse (of pixels in [-1, 1]), discriminator_loss if adversarial.
  """
  state, x, tx = dict(state), vqgan.to_float(images), optimizer(config)
  num_codes = state["usage"].shape[0]
  discriminator = state["discriminator"] if adversarial else None
  gradient = jax.value_and_grad(generator_loss, has_aux=True)
  (loss, (y, indices)), grads = gradient(state["params"], discriminator, config, num_codes, x)
  metrics = {"loss": loss, "mse": jnp.mean((y - x) ** 2)}
  state["params"], state["opt_state"] = _update(tx, grads, state["opt_state"], state["params"])
  if adversarial:
    loss, grads = jax.value_and_grad(discriminator_loss)(
      discriminator, config, x, jax.lax.stop_gradient(y)
    )
    metrics["discriminator_loss"] = loss
    old = state["discriminator_opt_state"]
    state["discriminator"], state["discriminator_opt_state"] = _update(
      tx, grads, old, discriminator
    )
  state["usage"] = state["usage"] + jnp.bincount(indices.ravel(), length=num_codes)
  state["step"] = state["step"] + 1
  return state, metrics


def _update(tx, grads, opt_state, params):
  updates, opt_state = tx.update(grads, opt_state, params)
  return optax.apply_updates(params, updates), opt_state


@functools.partial(jax.jit, static_argnums=2, donate_argnums=0)
def restart_dead_codes(state: dict, images, config: VQGANConfig, key) -> dict:
  """Moves every code that was not used since the last restart to a random encoding of `images`; counts anew.

  Args:
    state: of `init_state`; donated.
    images: uint8 [B, H, W, 3].
    config: of the VQGAN.
    key: of the choice.
  """
  table, usage = state["params"]["codebook"]["table"], state["usage"]
  model = vqgan.bind(config, len(usage), state["params"])
  z = vqgan.l2_normalize(model.encoder(vqgan.to_float(images))).reshape(-1, config.code_dim)
  chosen = z[jax.random.randint(key, (len(usage),), 0, len(z))]
  params = {
    **state["params"],
    "codebook": {"table": jnp.where((usage == 0)[:, None], chosen, table)},
  }
  return {**state, "params": params, "usage": jnp.zeros_like(usage)}


def batch_indices(step: int, num_images: int, batch_size: int, seed: int) -> np.ndarray:
  """Which images step `step` sees, int64 [B]: a new order every epoch, a pure function of the step."""
  epoch, i = divmod(step, num_images // batch_size)
  return _order(epoch, num_images, seed)[i * batch_size : (i + 1) * batch_size]


@functools.lru_cache(maxsize=1)
def _order(epoch: int, num_images: int, seed: int) -> np.ndarray:
  return np.random.default_rng([seed, epoch]).permutation(num_images)


def save_state(state: dict, folder: epath.PathLike, about: dict) -> None:
  """Writes the state into one file, atomically; `about` (config, seed, codes) goes into its header."""
  flat = {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(state)}
  header = {"about": json.dumps(plain(about))}
  vqgan.write_bytes(epath.Path(folder) / CHECKPOINT, safetensors.save(flat, header))


def load_state(template: dict, folder: epath.PathLike, about: dict) -> dict:
  """The state saved in `folder`, or `template` if none is, or one of a training of another length.

  Raises:
    UserError: the file is damaged, or it was written under another `about`.
  """
  path = epath.Path(folder) / CHECKPOINT
  if not path.exists():
    return template
  data = path.read_bytes()
  try:
    flat = safetensors.load(data)
  except SafetensorError as error:
    raise UserError(f"{path} is damaged ({error}): delete it to train from the start.") from error
  header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
  stored = json.loads(header["__metadata__"]["about"])
  if stages.differences(stored, plain(about)) and _without_steps(stored) == _without_steps(
    plain(about)
  ):
    print(
      f"vqgan: starts anew, as the learning rate of the {stored['vqgan']['steps']} steps begun here follows their number."
    )
    return template
  stages.check_same_config(path, stored, about)
  return jax.tree.map_with_path(lambda p, _: jnp.asarray(flat[jax.tree_util.keystr(p)]), template)


def _without_steps(about: dict) -> dict:
  return {
    **about,
    "vqgan": {k: v for k, v in about["vqgan"].items() if k not in ("steps", "checkpoint_every")},
  }


def train(
  config: VQGANConfig, num_codes: int, seed: int, images, folder: epath.PathLike
) -> ImageTokenizer:
  """Trains all steps, or those that a killed run left; deterministic in the seed.

  The batch is split over the devices if they divide it.

  Args:
    config: of the VQGAN.
    num_codes: K.
    seed: of parameters, order of the images and restarts.
    images: uint8 [n, H, W, 3] or anything that has a length and is indexed likewise, e.g. ImageFiles.
    folder: where the state is kept every `checkpoint_every` steps until the end.

  Raises:
    UserError: fewer images than one batch, or the folder holds the state of another config.
  """
  if len(images) < config.batch_size:
    raise UserError(
      f"config.vqgan.batch_size is {config.batch_size}; there are only {len(images)} training images."
    )
  epath.Path(folder).mkdir(parents=True, exist_ok=True)
  about = {"vqgan": dataclasses.asdict(config), "num_codes": num_codes, "seed": seed}
  replicated, split = _layouts(config.batch_size)
  state = jax.device_put(load_state(init_state(config, num_codes, seed), folder, about), replicated)
  start, adversarial_from = int(state["step"]), config.adversarial_start * config.steps
  keys = jax.random.key(seed + 1)
  bar = tqdm(
    range(start, config.steps), "vqgan", config.steps, initial=start, mininterval=1, unit="step"
  )
  for step in bar:
    batch = jax.device_put(images[batch_indices(step, len(images), config.batch_size, seed)], split)
    adversarial = config.adversarial_weight > 0 and step >= adversarial_from
    state, metrics = train_step(state, batch, config, adversarial)
    done = step + 1
    if (
      config.restart_every
      and done % config.restart_every == 0
      and done < config.restart_until * config.steps
    ):
      state = restart_dead_codes(state, batch, config, jax.random.fold_in(keys, done))
    if done % LOG_EVERY == 0:
      bar.set_postfix(
        {name: f"{float(value):.3f}" for name, value in metrics.items()}, refresh=False
      )
    if done % config.checkpoint_every == 0 and done < config.steps:
      save_state(state, folder, about)
  return ImageTokenizer(config, num_codes, jax.device_put(state["params"], jax.devices()[0]))


def _layouts(batch_size: int):
  """Shardings of the state and of a batch: data parallel over all devices if they divide the batch, else one device."""
  devices = jax.devices() if batch_size % jax.device_count() == 0 else jax.devices()[:1]
  mesh = jax.make_mesh((len(devices),), ("data",), (AxisType.Auto,), devices=devices)
  return NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))


def mean_squared_errors(images: np.ndarray, reconstructions: np.ndarray) -> np.ndarray:
  """fp64 [n]: of each image, in units of the full range of a pixel, so that PSNR = -10 log10 of it."""
  return np.mean((images.astype(np.float64) - reconstructions) ** 2, axis=(1, 2, 3)) / 255**2


def perplexity(codes: np.ndarray, num_codes: int) -> float:
  """exp of the entropy of how often each code is used: between 1 (one code) and K (all equally often)."""
  p = np.bincount(codes.ravel(), minlength=num_codes) / codes.size
  return float(np.exp(-np.sum(p * np.log(np.where(p > 0, p, 1)))))


def evaluate(tokenizer: ImageTokenizer, images, train_images, folder: epath.PathLike) -> dict:
  """Measures held-out `images` (at most 4,096) and the codes of 1,024 training images; writes reconstructions.npz.

  Returns:
    psnr_db: mean over images of each one's PSNR; psnr_of_mean_mse_db: PSNR of the mean squared error of all;
    codebook_perplexity and codes_used (held-out), and the same with prefix train_.
  """
  images = images[np.arange(min(len(images), MAX_HELDOUT))]
  codes = tokenizer.encode(images)
  reconstructions = tokenizer.decode(codes)
  train_codes = tokenizer.encode(
    train_images[_evenly_spaced(len(train_images), NUM_TRAIN_MEASURED)]
  )
  shown = _evenly_spaced(len(images), NUM_RECONSTRUCTIONS)
  partial = epath.Path(folder) / "partial.npz"
  with partial.open("wb") as file:
    np.savez_compressed(file, originals=images[shown], reconstructions=reconstructions[shown])
  partial.replace(epath.Path(folder) / RECONSTRUCTIONS)
  errors = np.maximum(mean_squared_errors(images, reconstructions), 1e-10)
  return {
    "psnr_db": float(np.mean(-10 * np.log10(errors))),
    "psnr_of_mean_mse_db": float(-10 * np.log10(errors.mean())),
    "codebook_perplexity": perplexity(codes, tokenizer.num_codes),
    "codes_used": len(np.unique(codes)),
    "train_codebook_perplexity": perplexity(train_codes, tokenizer.num_codes),
    "train_codes_used": len(np.unique(train_codes)),
  }


def _evenly_spaced(length: int, count: int) -> np.ndarray:
  return np.unique(np.linspace(0, length - 1, count).astype(int))


def train_vqgan(
  config: VQGANConfig, num_codes: int, seed: int, images, heldout_images, folder: epath.PathLike
) -> dict:
  """The whole stage: trains, writes params.safetensors, config.json and reconstructions.npz, returns the numbers."""
  start = time.time()
  tokenizer = train(config, num_codes, seed, images, folder)
  seconds = time.time() - start
  tokenizer.save(folder)
  summary = {
    **evaluate(tokenizer, heldout_images, images, folder),
    "steps": config.steps,
    "seconds": round(seconds, 1),
  }
  (epath.Path(folder) / CHECKPOINT).unlink(missing_ok=True)
  return summary

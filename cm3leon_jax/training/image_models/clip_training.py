"""Trains a CLIP model on captioned images (contrastive loss), and measures held-out recall."""

# B batch, L length, E embedding, H height, W width, n pairs.

from collections.abc import Callable, Mapping
import dataclasses
import functools
import time
from typing import TypeAlias

from etils import epath
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Int32, Key, UInt8
import numpy as np
import optax

from cm3leon_jax.clip import model as clip_lib
from cm3leon_jax.clip.model import CLIP
from cm3leon_jax.config.tokenizers import CLIPConfig
from cm3leon_jax.data.documents.store import group_id
from cm3leon_jax.data.raw import reader
from cm3leon_jax.data.sources.records import RawPair
from cm3leon_jax.errors import UserError
from cm3leon_jax.tokenizers.vqgan import to_float
from cm3leon_jax.training.image_models import trainer
from cm3leon_jax.vocab import VocabLayout

MAX_SCALE = 100.0
READ_THREADS = 8
MAX_HELDOUT = 4_096
# Images uint8 [B, H, W, 3], tokens int32 [B, L], concepts int32 [B], on the host or on devices.
ClipBatch: TypeAlias = tuple[Array | np.ndarray, Array | np.ndarray, Array | np.ndarray]


@dataclasses.dataclass(frozen=True)
class ClipData:
  """Pairs of images and captions.

  Images that take more than 2 GiB in total stay on disk. The other data needs 4 L + 150 bytes of
  memory per pair.

  Attributes:
    tokens: captions, padded with `<pad>`.
    concepts: index of each pair's concept. Pairs with the same concept are not negatives of each
      other.
  """

  images: UInt8[np.ndarray, "n H W 3"] | reader.ImageFiles
  tokens: Int32[np.ndarray, "n L"]
  concepts: Int32[np.ndarray, " n"]

  def __len__(self) -> int:
    return len(self.tokens)

  def __getitem__(self, rows: np.ndarray) -> ClipBatch:
    return self.images[rows], self.tokens[rows], self.concepts[rows]


def open_data(
  folder: epath.PathLike, split: str, encode: Callable[[str], np.ndarray], config: CLIPConfig
) -> ClipData:
  """Opens the pairs of a split in their stored order; `encode` converts a caption to int32 ids."""
  paths, tokens, concepts = [], [], []
  for name in reader.shards(folder):
    pairs = reader.read_shard(folder, name, RawPair, split)
    paths += [pair.image for pair in pairs]
    tokens.append(clip_lib.pad_texts([encode(p.caption) for p in pairs], config.text_length))
    concepts.append(np.array([group_id(p.concept or p.caption) for p in pairs], np.uint64))
  _, numbers = np.unique(np.concatenate(concepts), return_inverse=True)
  images = reader.in_memory(reader.ImageFiles(paths, config.resolution, READ_THREADS))
  return ClipData(images, np.concatenate(tokens), numbers.astype(np.int32))


def contrastive_loss(
  image_embeddings: Float[Array | np.ndarray, "B E"],
  text_embeddings: Float[Array | np.ndarray, "B E"],
  scale: float | Float[Array, ""],
  concepts: Int[Array | np.ndarray, " B"],
) -> Float[Array, ""]:
  """Computes the contrastive loss of CLIP (Radford et al. 2021, figure 3).

  One term is the cross-entropy of choosing, for each caption, its image among all images of the
  batch. The other term is the cross-entropy of choosing, for each image, its caption among all
  captions. The loss is the mean of both terms.

  Args:
    image_embeddings, text_embeddings: embeddings of norm 1.
    scale: inverse temperature.
    concepts: index of each pair's concept. Other pairs of the same concept are not candidates.
  """
  logits = scale * image_embeddings @ text_embeddings.T
  same = (concepts[:, None] == concepts[None, :]) & ~jnp.eye(len(concepts), dtype=bool)
  logits = jnp.where(same, -jnp.inf, logits)
  right = jnp.diagonal(logits)
  return 0.5 * (
    (jax.nn.logsumexp(logits, 1) - right).mean() + (jax.nn.logsumexp(logits, 0) - right).mean()
  )


def augment(
  images: Float32[Array | np.ndarray, "B H W 3"],
  tokens: Int32[Array | np.ndarray, "B L"],
  key: jax.Array,
  config: CLIPConfig,
) -> tuple[Float32[Array, "B H W 3"], Int32[Array, "B L"]]:
  """Augments pairs: shifts images, scales the difference of their colors from white, drops tokens.

  Pixels are in [-1, 1], and a shift fills the border with white. If all tokens of a caption would
  be dropped, the caption stays unchanged. Images are not mirrored, because captions mention the
  left and the right side.
  """
  shift_key, color_key, text_key = jax.random.split(key, 3)
  margin = round(config.shift * config.resolution)
  padded = jnp.pad(
    images, ((0, 0), (margin, margin), (margin, margin), (0, 0)), constant_values=1.0
  )
  offsets = jax.random.randint(shift_key, (len(images), 2), 0, 2 * margin + 1)
  images = jax.vmap(lambda x, o: jax.lax.dynamic_slice(x, (o[0], o[1], 0), images.shape[1:]))(
    padded, offsets
  )
  jitter = jax.random.uniform(color_key, (len(images), 1, 1, 3), minval=-1)
  images = 1 - (1 - images) * (1 + config.color_jitter * jitter)
  dropped = jax.random.bernoulli(text_key, config.text_dropout, tokens.shape)
  kept = jnp.where(dropped, VocabLayout.pad, tokens)
  some_left = (kept != VocabLayout.pad).any(1, keepdims=True)
  return images, jnp.where(some_left, kept, tokens)


def make_optimizer(config: CLIPConfig) -> optax.GradientTransformation:
  """Creates AdamW with warm-up and a cosine decay to 0. Weight decay acts only on matrices."""
  warmup = round(config.warmup_fraction * config.steps)
  schedule = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, warmup, config.steps)
  mask = functools.partial(jax.tree.map, lambda p: p.ndim > 1)
  return optax.adamw(schedule, b2=0.98, eps=1e-6, weight_decay=config.weight_decay, mask=mask)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def train_step(
  config: CLIPConfig, text_size: int, state: dict, batch: ClipBatch, key: Key[Array, ""]
) -> tuple[dict, dict]:
  """Takes one AdamW step. Negatives are the other pairs of the global batch, on all devices.

  Args:
    state: params and opt_state; donated.
    batch: images uint8 [B, H, W, 3], tokens int32 [B, L], concepts int32 [B].

  Returns:
    The new state, and the metrics, which contain only the loss.
  """
  images, tokens, concepts = batch

  def loss_fn(params: dict) -> Float[Array, ""]:
    model = clip_lib.bind(config, text_size, params)
    x, t = augment(to_float(images), tokens, key, config)
    scale = jnp.minimum(jnp.exp(params["log_scale"]), MAX_SCALE)
    return contrastive_loss(model.embed_images(x), model.embed_texts(t), scale, concepts)

  params = state["params"]
  loss, grads = jax.value_and_grad(loss_fn)(params)
  updates, opt_state = make_optimizer(config).update(grads, state["opt_state"], params)
  state = {"params": optax.apply_updates(params, updates), "opt_state": opt_state}
  return trainer.keep_layout(state), {"loss": loss}


def train(
  config: CLIPConfig,
  text_size: int,
  data: ClipData,
  folder: epath.PathLike,
  seed: int,
  inputs: Mapping[str, str],
) -> CLIP:
  """Trains CLIP for all steps, or the remaining steps of a killed run; see `trainer.train`."""

  def init() -> dict:
    params = clip_lib.init_params(config, text_size, jax.random.key(seed))
    return {"params": params, "opt_state": make_optimizer(config).init(params)}

  def step(state: dict, batch: ClipBatch, i: int) -> tuple[dict, dict]:
    key = jax.random.fold_in(jax.random.key(seed), i)
    return train_step(config, text_size, state, batch, key)

  about = {"text_size": text_size, "inputs": inputs}
  training = trainer.SmallTraining("clip", config, about, seed, data, folder, init, step)
  state = trainer.train(training)
  return CLIP(config, text_size, jax.device_put(state["params"]))


def text_to_image_recall(
  text_embeddings: Float[np.ndarray, "n E"],
  image_embeddings: Float[np.ndarray, "n E"],
  captions: list[str],
) -> dict[str, float | int]:
  """Measures how often the image of a caption is among the k nearest images, for k = 1 and 5.

  All images with the same caption are correct. A caption is a hit if fewer than k incorrect images
  score at least as high as its best correct image. So the recall of constant or NaN embeddings is
  0. Returns recall@k, chance@k (the expected recall of random scores), and `candidates` = n.
  """
  n = len(captions)
  scores = np.asarray(text_embeddings, np.float64) @ np.asarray(image_embeddings, np.float64).T
  _, names = np.unique(captions, return_inverse=True)
  right = names[:, None] == names[None, :]
  best = np.where(right, scores, -np.inf).max(1)
  rank = (~right & ~(scores < best[:, None])).sum(1)
  result: dict[str, float | int] = {"candidates": n}
  for k in (1, 5):
    result[f"recall@{k}"] = float((rank < k).mean())
    # The probability that k random images include no correct image.
    wrong = n - right.sum(1)
    miss = np.prod([np.maximum(wrong - i, 0) / max(n - i, 1) for i in range(min(k, n))], axis=0)
    result[f"chance@{k}"] = float((1 - miss).mean())
  return result


def check_recall(found: dict[str, float | int]) -> None:
  """Raises UserError if the result of `text_to_image_recall` is no better than chance.

  Checks nothing for five candidates or fewer, because recall@5 is then always 1.
  """
  better = any(found[f"recall@{k}"] > found[f"chance@{k}"] for k in (1, 5))
  if found["chance@5"] < 1 and not better:
    shown = ", ".join(
      f"recall@{k} {found[f'recall@{k}']:.3f} (chance {found[f'chance@{k}']:.3f})" for k in (1, 5)
    )
    raise UserError(
      f"CLIP finds the images of held-out captions no better than chance, {shown} of "
      f"{found['candidates']} images: train it longer (config.clip.steps), with another "
      "config.clip.learning_rate, or on more pairs."
    )


def train_clip(
  config: CLIPConfig,
  encode: Callable[[str], np.ndarray],
  text_size: int,
  raw_folder: epath.PathLike,
  folder: epath.PathLike,
  seed: int,
  inputs: Mapping[str, str],
) -> dict:
  """Runs the stage on the current mesh: trains and writes a CLIP model, and measures its recall.

  The caller deletes the checkpoints after the stage is finished.

  Args:
    encode: converts a caption to int32 ids below `text_size`.
    inputs: ids of the stages that this stage reads, see `stages.inputs`.

  Returns:
    Steps, pairs, seconds, and recall among at most 4,096 evenly spaced held-out pairs.

  Raises:
    UserError: the training diverged, or the recall is no better than chance.
  """
  start = time.monotonic()
  data = open_data(raw_folder, "train", encode, config)
  trained = train(config, text_size, data, folder, seed, inputs)
  trained.save(folder)
  summary = {
    "steps": config.steps,
    "pairs": len(data),
    "seconds": round(time.monotonic() - start, 1),
  }
  heldout = reader.read_pairs(raw_folder, "heldout")
  if heldout:
    heldout = heldout[:: -(-len(heldout) // MAX_HELDOUT)]
    images = reader.load_images([p.image for p in heldout], config.resolution, READ_THREADS)
    captions = [pair.caption for pair in heldout]
    texts = trained.embed_texts([encode(caption) for caption in captions])
    summary.update(text_to_image_recall(texts, trained.embed_images(images), captions))
    check_recall(summary)
    print(
      f"clip: held-out text-to-image recall@1 {summary['recall@1']:.3f} "
      f"(chance {summary['chance@1']:.3f}), recall@5 {summary['recall@5']:.3f} "
      f"(chance {summary['chance@5']:.3f}) of {len(heldout)}; {config.steps} steps, "
      f"{summary['seconds']:.0f} s.",
      flush=True,
    )
  return summary

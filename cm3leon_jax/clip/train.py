"""Training of the CLIP on captioned images, contrastively, and its held-out recall."""

# B batch, L length, E embedding, H height, W width, n held-out pairs.

import dataclasses
import functools
import time

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import optax

from cm3leon_jax.clip import model as clip_lib
from cm3leon_jax.clip.model import CLIP, CLIPConfig
from cm3leon_jax.data import raw_pairs
from cm3leon_jax.data.documents import group_id
from cm3leon_jax.data.records import RawPair
from cm3leon_jax.training import small_trainer

MAX_SCALE = 100.0
READ_THREADS = 8
MAX_HELDOUT = 4_096


@dataclasses.dataclass(frozen=True)
class ClipData:
  """Pairs whose images stay on disk where they take more than 2 GiB.

  The rest takes about 4 L + 150 bytes a pair.

  Attributes:
    images: [n, H, W, 3] uint8, or what reads rows of it from disk.
    tokens: [n, L] int32, `<pad>` after each caption.
    concepts: [n] int32; pairs of one concept are no negatives of each other.
  """

  images: np.ndarray | raw_pairs.ImageFiles
  tokens: np.ndarray
  concepts: np.ndarray

  def __len__(self) -> int:
    return len(self.tokens)

  def __getitem__(self, rows: np.ndarray):
    return self.images[rows], self.tokens[rows], self.concepts[rows]


def open_data(folder: epath.PathLike, split: str, encode, config: CLIPConfig) -> ClipData:
  """Opens the pairs of a split of a raw folder, in their order; `encode`: caption -> int32 ids."""
  paths, tokens, concepts = [], [], []
  for name in raw_pairs.shards(folder):
    pairs = raw_pairs.read_shard(folder, name, RawPair, split)
    paths += [pair.image for pair in pairs]
    tokens.append(clip_lib.pad_texts([encode(p.caption) for p in pairs], config.text_length))
    concepts.append(np.array([group_id(p.concept or p.caption) for p in pairs], np.uint64))
  _, concepts = np.unique(np.concatenate(concepts), return_inverse=True)
  images = raw_pairs.in_memory(raw_pairs.ImageFiles(paths, config.resolution, READ_THREADS))
  return ClipData(images, np.concatenate(tokens), concepts.astype(np.int32))


def contrastive_loss(image_embeddings, text_embeddings, scale, concepts):
  """Computes the cross-entropy of finding each pair's other half in the batch, both ways.

  Radford et al. 2021, figure 3.

  Args:
    image_embeddings: [B, E] of norm 1.
    text_embeddings: [B, E] of norm 1.
    scale: inverse temperature.
    concepts: [B] int32; another pair of the same concept is neither right nor wrong.

  Returns:
    fp32 scalar, mean over both directions.
  """
  logits = scale * image_embeddings @ text_embeddings.T
  same = (concepts[:, None] == concepts[None, :]) & ~jnp.eye(len(concepts), dtype=bool)
  logits = jnp.where(same, -jnp.inf, logits)
  right = jnp.diagonal(logits)
  return 0.5 * (
    (jax.nn.logsumexp(logits, 1) - right).mean() + (jax.nn.logsumexp(logits, 0) - right).mean()
  )


def augment(images, tokens, key, config: CLIPConfig):
  """Shifts images over white, changes their colors' distance from white, leaves out tokens.

  Images are not mirrored: captions tell left from right.

  Args:
    images: [B, H, W, 3] in [-1, 1].
    tokens: [B, L] int32; at least one token of each caption stays.
    key: random key.
    config: shift, color_jitter, text_dropout.
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
  strength = 1 + config.color_jitter * jax.random.uniform(
    color_key, (len(images), 1, 1, 3), minval=-1
  )
  images = 1 - (1 - images) * strength
  kept = jnp.where(
    jax.random.bernoulli(text_key, config.text_dropout, tokens.shape),
    clip_lib.VocabLayout.pad,
    tokens,
  )
  some_left = (kept != clip_lib.VocabLayout.pad).any(1, keepdims=True)
  return images, jnp.where(some_left, kept, tokens)


def make_optimizer(config: CLIPConfig) -> optax.GradientTransformation:
  warmup = round(config.warmup_fraction * config.steps)
  schedule = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, warmup, config.steps)
  is_matrix = lambda params: jax.tree.map(lambda p: p.ndim > 1, params)
  return optax.adamw(schedule, b2=0.98, eps=1e-6, weight_decay=config.weight_decay, mask=is_matrix)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def train_step(config: CLIPConfig, text_size: int, state: dict, batch, key) -> tuple[dict, dict]:
  """Takes one AdamW step; every other pair of the global batch is a negative, on any device.

  Args:
    config: of the CLIP.
    text_size: size of the text vocabulary.
    state: params and opt_state; donated.
    batch: (images uint8 [B, H, W, 3], tokens int32 [B, L], concepts int32 [B]).
    key: of the augmentation.

  Returns:
    The new state; metrics: loss.
  """
  images, tokens, concepts = batch

  def loss_fn(params):
    model = clip_lib.bind(config, text_size, params)
    x, t = augment(clip_lib.to_float(images), tokens, key, config)
    scale = jnp.minimum(jnp.exp(params["log_scale"]), MAX_SCALE)
    return contrastive_loss(model.embed_images(x), model.embed_texts(t), scale, concepts)

  params = state["params"]
  loss, grads = jax.value_and_grad(loss_fn)(params)
  updates, opt_state = make_optimizer(config).update(grads, state["opt_state"], params)
  return {"params": optax.apply_updates(params, updates), "opt_state": opt_state}, {"loss": loss}


def train(
  config: CLIPConfig, text_size: int, data: ClipData, folder: epath.PathLike, seed: int
) -> CLIP:
  """Trains all steps, or those that a killed training left; see `small_trainer.train`."""

  def init():
    params = clip_lib.init_params(config, text_size, jax.random.key(seed))
    return {"params": params, "opt_state": make_optimizer(config).init(params)}

  def step(state, batch, i):
    key = jax.random.fold_in(jax.random.key(seed), i)
    return train_step(config, text_size, state, batch, key)

  about = {"text_size": text_size}
  state = small_trainer.train("clip", config, about, seed, data, folder, init, step)
  return CLIP(config, text_size, jax.device_put(state["params"]))


def text_to_image_recall(
  text_embeddings, image_embeddings, captions: list[str]
) -> dict[str, float]:
  """How often a caption's own image is among the nearest ones.

  An image with the very same caption is right too. An image counts as found only if fewer than k
  wrong ones score at least as high, so that a constant embedding finds nothing.

  Args:
    text_embeddings: [n, E].
    image_embeddings: [n, E]; row i belongs to text i.
    captions: n texts.

  Returns:
    recall@k and chance@k (the expectation for random scores) for k = 1, 5, and `candidates` = n.
  """
  n = len(captions)
  scores = np.asarray(text_embeddings, np.float64) @ np.asarray(image_embeddings, np.float64).T
  _, names = np.unique(captions, return_inverse=True)
  right = names[:, None] == names[None, :]
  best = np.where(right, scores, -np.inf).max(1)
  rank = (~right & (scores >= best[:, None])).sum(1)
  result = {"candidates": n}
  for k in (1, 5):
    result[f"recall@{k}"] = float((rank < k).mean())
    # The chance that k images drawn without replacement miss all the right ones.
    wrong = n - right.sum(1)
    miss = np.prod([np.maximum(wrong - i, 0) / max(n - i, 1) for i in range(min(k, n))], axis=0)
    result[f"chance@{k}"] = float((1 - miss).mean())
  return result


def train_clip(config: CLIPConfig, encode, text_size: int, raw_folder, folder, seed: int) -> dict:
  """Runs the stage on the current mesh: trains, writes the CLIP, measures its recall.

  Args:
    config: sizes and recipe.
    encode: caption -> int32 ids below `text_size`.
    text_size: size of the text vocabulary.
    raw_folder: of `ingest.prepare`.
    folder: where the result goes.
    seed: of initialization, order and augmentation.

  Returns:
    The numbers for the report: recall among the held-out pairs (at most 4,096, evenly spaced).
  """
  start = time.time()
  data = open_data(raw_folder, "train", encode, config)
  trained = train(config, text_size, data, folder, seed)
  trained.save(folder)
  small_trainer.delete_checkpoints(folder)
  summary = {"steps": config.steps, "pairs": len(data), "seconds": round(time.time() - start, 1)}
  heldout = raw_pairs.read_pairs(raw_folder, "heldout")
  if heldout:
    heldout = heldout[:: -(-len(heldout) // MAX_HELDOUT)]
    images = raw_pairs.load_images([p.image for p in heldout], config.resolution, READ_THREADS)
    captions = [pair.caption for pair in heldout]
    texts = trained.embed_texts([encode(caption) for caption in captions])
    summary.update(text_to_image_recall(texts, trained.embed_images(images), captions))
    print(
      f"clip: held-out text-to-image recall@1 {summary['recall@1']:.3f} "
      f"(chance {summary['chance@1']:.3f}), recall@5 {summary['recall@5']:.3f} "
      f"(chance {summary['chance@5']:.3f}) of {len(heldout)}; {config.steps} steps, "
      f"{summary['seconds']:.0f} s.",
      flush=True,
    )
  return summary

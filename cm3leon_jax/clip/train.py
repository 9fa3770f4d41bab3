"""Training of the CLIP on captioned images, contrastively, and its held-out recall."""

# B batch, L length, E embedding, H height, W width, n held-out pairs.

import dataclasses
import functools
import json
import time

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from cm3leon_jax import stages
from cm3leon_jax.clip import model as clip_lib
from cm3leon_jax.clip.model import CLIP, CLIPConfig
from cm3leon_jax.config import UserError
from cm3leon_jax.data import raw_pairs
from cm3leon_jax.io import plain

CHECKPOINT = "checkpoint.safetensors"
MAX_SCALE = 100.0
READ_THREADS = 8


@dataclasses.dataclass(frozen=True)
class ClipData:
  """Pairs in memory.

  Attributes:
    images: [n, H, W, 3] uint8.
    tokens: [n, L] int32, `<pad>` behind each caption.
    concepts: [n] int32; pairs of one concept are no negatives of each other.
    captions: [n] their text.
  """

  images: np.ndarray
  tokens: np.ndarray
  concepts: np.ndarray
  captions: list[str]


def load_data(pairs: list[raw_pairs.RawPair], encode, config: CLIPConfig) -> ClipData:
  """Reads the images and encodes the captions (`encode`: str -> int32 ids) of `pairs`."""
  _, concepts = np.unique([p.concept or p.caption for p in pairs], return_inverse=True)
  images = raw_pairs.load_images([p.image for p in pairs], config.resolution, READ_THREADS)
  tokens = clip_lib.pad_texts([encode(p.caption) for p in pairs], config.text_length)
  return ClipData(images, tokens, concepts.astype(np.int32), [p.caption for p in pairs])


def contrastive_loss(image_embeddings, text_embeddings, scale, concepts):
  """Symmetric cross-entropy of finding each pair's other half in the batch (Radford et al. 2021, figure 3).

  Args:
    image_embeddings: [B, E] of norm 1.
    text_embeddings: [B, E] of norm 1.
    scale: inverse temperature.
    concepts: [B] int32; another pair of the same concept counts neither as right nor as wrong.

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
  """Shifts each image over white, changes its colors' distance from white, and leaves out tokens of its caption.

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


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(2, 3))
def train_step(config: CLIPConfig, text_size: int, params, opt_state, key, batch):
  """One AdamW step on `batch` = (images uint8 [B, H, W, 3], tokens [B, L], concepts [B]); returns params, opt_state, loss."""
  images, tokens, concepts = batch

  def loss_fn(params):
    model = clip_lib.bind(config, text_size, params)
    x, t = augment(clip_lib.to_float(images), tokens, key, config)
    scale = jnp.minimum(jnp.exp(params["log_scale"]), MAX_SCALE)
    return contrastive_loss(model.embed_images(x), model.embed_texts(t), scale, concepts)

  loss, grads = jax.value_and_grad(loss_fn)(params)
  updates, opt_state = make_optimizer(config).update(grads, opt_state, params)
  return optax.apply_updates(params, updates), opt_state, loss


def batch_rows(n: int, batch_size: int, step: int, seed: int) -> np.ndarray:
  """Rows of step `step`, a pure function: every epoch is a new permutation of the n pairs, its remainder left out."""
  epoch, place = divmod(step, n // batch_size)
  order = np.random.default_rng([seed, epoch]).permutation(n)
  return order[place * batch_size : (place + 1) * batch_size]


def train(
  config: CLIPConfig, text_size: int, data: ClipData, folder: epath.PathLike, seed: int
) -> CLIP:
  """Trains for `config.steps`, from the folder's checkpoint if a killed training left one.

  Raises:
    UserError: fewer pairs than one batch, or a checkpoint of another training.
  """
  folder, n = epath.Path(folder), len(data.images)
  if n < config.batch_size:
    raise UserError(
      f"{n} training pairs are too few for config.clip.batch_size = {config.batch_size}; make it smaller."
    )
  folder.mkdir(parents=True, exist_ok=True)
  identity = json.dumps(
    plain({"config": dataclasses.asdict(config), "text_size": text_size, "seed": seed, "pairs": n})
  )
  params = clip_lib.init_params(config, text_size, jax.random.key(seed))
  first, params, opt_state = _restore(
    folder / CHECKPOINT, identity, params, make_optimizer(config).init(params)
  )
  bar = tqdm(
    range(first, config.steps), "clip", config.steps, initial=first, unit="step", mininterval=1
  )
  for step in bar:
    rows = batch_rows(n, config.batch_size, step, seed)
    key = jax.random.fold_in(jax.random.key(seed), step)
    batch = (data.images[rows], data.tokens[rows], data.concepts[rows])
    params, opt_state, loss = train_step(config, text_size, params, opt_state, key, batch)
    if (step + 1) % 10 == 0:
      bar.set_postfix(loss=f"{float(loss):.3f}", refresh=False)
    if (step + 1) % config.checkpoint_every == 0 and step + 1 < config.steps:
      _save(folder / CHECKPOINT, identity, step + 1, params, opt_state)
  return CLIP(config, text_size, params)


def _save(path, identity: str, step: int, params, opt_state) -> None:
  leaves = jax.tree.leaves((params, opt_state))
  digits = len(str(len(leaves)))
  tensors = {f"{i:0{digits}d}": leaf for i, leaf in enumerate(leaves)}
  clip_lib.write_tensors(
    path,
    {"step": np.array(step), "identity": np.frombuffer(identity.encode(), np.uint8), **tensors},
  )


def _restore(path: epath.Path, identity: str, params, opt_state):
  if not path.exists():
    return 0, params, opt_state
  stored = clip_lib.read_tensors(path)
  step, found = int(stored.pop("step")), stored.pop("identity").tobytes().decode()
  if found != identity:
    changes = stages.differences(json.loads(found), json.loads(identity))
    if all(change.startswith("config.steps:") for change in changes):
      print(
        f"clip: starts anew, as the learning rate follows the number of steps ({changes[0]}).",
        flush=True,
      )
      return 0, params, opt_state
    changed = "; ".join(changes)
    raise UserError(
      f"{path} was left by another training ({changed}): restore those values, or delete it to start anew."
    )
  leaves = [jnp.asarray(stored[name]) for name in sorted(stored)]
  params, opt_state = jax.tree.unflatten(jax.tree.structure((params, opt_state)), leaves)
  print(f"clip: continues from step {step}.", flush=True)
  return step, params, opt_state


def text_to_image_recall(
  text_embeddings, image_embeddings, captions: list[str]
) -> dict[str, float]:
  """How often a caption's own image is among the nearest ones.

  An image with the very same caption is right too. An image counts as found only if fewer than k wrong ones score at least
  as high, so that a constant embedding finds nothing.

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
  """The stage: trains on the train pairs, writes params.safetensors and config.json, measures on the held-out concepts.

  Args:
    config: sizes and recipe.
    encode: caption -> int32 ids below `text_size`.
    text_size: size of the text vocabulary.
    raw_folder: holds pairs.jsonl and images.
    folder: where the result goes.
    seed: of initialization, order and augmentation.

  Returns:
    The numbers for the report.
  """
  start = time.time()
  pairs = raw_pairs.read_pairs(raw_folder, "train")
  trained = train(config, text_size, load_data(pairs, encode, config), folder, seed)
  trained.save(folder)
  (epath.Path(folder) / CHECKPOINT).unlink(missing_ok=True)
  summary = {"steps": config.steps, "pairs": len(pairs), "seconds": round(time.time() - start, 1)}
  heldout = raw_pairs.read_pairs(raw_folder, "heldout")
  if heldout:
    data = load_data(heldout, encode, config)
    images, texts = (
      trained.embed_images(data.images),
      trained.embed_texts([row[row != 0] for row in data.tokens]),
    )
    summary.update(text_to_image_recall(texts, images, data.captions))
    print(
      f"clip: held-out text-to-image recall@1 {summary['recall@1']:.3f} (chance {summary['chance@1']:.3f}), recall@5 "
      f"{summary['recall@5']:.3f} (chance {summary['chance@5']:.3f}) of {len(heldout)}; {config.steps} steps, "
      f"{summary['seconds']:.0f} s.",
      flush=True,
    )
  return summary

"""The bank of documents that can be retrieved, as embeddings on disk: written shard by shard, read by rows."""

# n documents, m of a shard, E embedding.

from collections.abc import Callable
import dataclasses
import hashlib

from etils import epath
import numpy as np
from tqdm import tqdm

from cm3leon_jax.clip import huggingface as hf_clip
from cm3leon_jax.clip.huggingface import HFCLIP
from cm3leon_jax.clip.model import CLIP, CONFIG, normalize
from cm3leon_jax.data import raw_pairs
from cm3leon_jax.data.documents import group_id
from cm3leon_jax.data.records import SPLITS, RawPair
from cm3leon_jax.io import read_json
from cm3leon_jax.retrieval.arrays import ArrayStore
from cm3leon_jax.shards import Runner, run_shards
from cm3leon_jax.tokenizers.text import TextTokenizer
from cm3leon_jax.vocab import VocabLayout

EMBED_CHUNK = 512
READ_THREADS = 8


def load_clip(folder: str, workdir: epath.PathLike, vocab: VocabLayout) -> CLIP | HFCLIP:
  """The Hugging Face CLIP in `folder`, or with "" the run's own. Raises UserError naming what is absent or unfit."""
  if folder:
    return HFCLIP.load(folder)
  workdir = epath.Path(workdir)
  return CLIP.load(workdir / "clip", TextTokenizer(workdir / "text_tokenizer", vocab).encode)


def embedding_width(folder: str, workdir: epath.PathLike) -> int:
  """E of what `load_clip` loads, read off its config alone."""
  if folder:
    return hf_clip.read_config(folder).embed_dim
  return read_json(epath.Path(workdir) / "clip" / CONFIG)["clip"]["embed_dim"]


class Embeddings:
  """The caption-image pairs of one split, in the order of their document store; every one is multimodal.

  Attributes:
    documents: [n, E] float16 of norm 1: the normalized mean of a pair's caption and image (CM3Leon, section 2.1).
    queries: [n, E] float16 of norm 1: the caption, in the split `train` with the query dropout.
    images: [n, E] float16 of norm 1.
    groups, keys: [n] uint64, see `documents.group_id`; equal ones are near-duplicates, or the same document.
  """

  def __init__(self, folder: epath.PathLike):
    """Raises UserError if `build_neighbors` has not written `folder`."""
    folder = epath.Path(folder)
    self.documents, self.queries, self.images, self.groups, self.keys = (
      ArrayStore(folder / name) for name in ARRAYS
    )

  def __len__(self) -> int:
    return len(self.documents)


ARRAYS = ("documents", "queries", "images", "groups", "keys")


@dataclasses.dataclass(frozen=True)
class EmbedJob:
  """Embeds the pairs of raw shards; a job of `shards.run_shards`.

  Attributes:
    raw: raw folder.
    folder: gets {split}/ with the arrays of `Embeddings`.
    load_clip: () -> CLIP or HFCLIP.
    dropout: share of the caption's tokens that is left out of queries of the split `train`.
    seed: of the dropout.
    starts: split -> name of the shard -> first row of its pairs.
  """

  raw: str
  folder: str
  load_clip: Callable[[], CLIP | HFCLIP]
  dropout: float
  seed: int
  starts: dict[str, dict[str, int]]

  def open(self) -> Callable[[str], dict]:
    clip = self.load_clip()

    def embed_shard(name: str) -> dict:
      for split in SPLITS:
        pairs, folder = (
          raw_pairs.read_shard(self.raw, name, RawPair, split),
          epath.Path(self.folder) / split,
        )
        if pairs:
          rows = embed_pairs(clip, pairs, self.dropout if split == "train" else 0.0, self.seed)
          for array, values in rows.items():
            ArrayStore(folder / array).write(self.starts[split][name], values)
      return {}

    return embed_shard


def embed_pairs(
  clip: CLIP | HFCLIP, pairs: list[RawPair], dropout: float, seed: int
) -> dict[str, np.ndarray]:
  """Rows of the arrays of `Embeddings` for m pairs: [m, E] float32, and [m] uint64 of groups and keys."""
  parts = {name: [] for name in ("documents", "queries", "images")}
  for start in tqdm(
    range(0, len(pairs), EMBED_CHUNK), "embed", mininterval=1, unit="chunk", leave=False
  ):
    chunk = pairs[start : start + EMBED_CHUNK]
    ids = [clip.encode(p.caption) for p in chunk]
    texts = clip.embed_texts(ids)
    images = clip.embed_images(
      raw_pairs.load_images([p.image for p in chunk], clip.resolution, READ_THREADS)
    )
    parts["documents"].append(document_embeddings(texts, images))
    parts["images"].append(images)
    dropped = [drop_tokens(x, dropout, p.key, seed) for x, p in zip(ids, chunk)]
    parts["queries"].append(clip.embed_texts(dropped) if dropout else texts)
  rows = {name: np.concatenate(arrays) for name, arrays in parts.items()}
  ids_of = lambda names: np.array([group_id(name) for name in names], np.uint64)
  return {**rows, "groups": ids_of(p.group for p in pairs), "keys": ids_of(p.key for p in pairs)}


def document_embeddings(texts: np.ndarray, images: np.ndarray) -> np.ndarray:
  """Embeddings [m, E] of both parts -> normalized mean [m, E]."""
  return np.asarray(normalize((texts + images) / 2))


def drop_tokens(ids: np.ndarray, share: float, key: str, seed: int) -> np.ndarray:
  """Leaves out `share` of the ids at random, the same ones for the same (key, seed); at least one id stays."""
  digest = hashlib.sha256(key.encode()).digest()
  rng = np.random.default_rng([seed, int.from_bytes(digest[:8], "big")])
  order = rng.random(len(ids))
  kept = order >= share
  kept[np.argmax(order)] = True
  return ids[kept]


def embed(job: EmbedJob, width: int, inputs: dict, runner: Runner) -> dict:
  """Embeds what is not embedded yet of both splits: the arrays grow when raw shards were added.

  Args:
    job: how; its `starts` may be empty, they are those of the raw folder.
    width: E.
    inputs: what embeddings depend on besides the pairs: the CLIP.
    runner: where.

  Returns:
    What the embeddings of each split depend on, to tell whether they changed.
  """
  raw, folder = raw_pairs.shards(job.raw), epath.Path(job.folder)
  starts = {split: {} for split in SPLITS}
  for split in SPLITS:
    count = 0
    for name, shard in raw.items():
      starts[split][name], count = count, count + shard[f"{split}_pairs"]
    for name in ARRAYS:
      row, dtype = (
        ((width,), np.float16) if name in ("documents", "queries", "images") else ((), np.uint64)
      )
      ArrayStore.prepare(folder / split / name, row, dtype, count)
  common = {"inputs": inputs, "width": width, "dropout": job.dropout, "seed": job.seed}
  place = lambda name: {split: starts[split][name] for split in SPLITS}
  configs = {
    name: {**common, "digest": shard["digest"], "starts": place(name)}
    for name, shard in raw.items()
  }
  job = dataclasses.replace(job, starts=starts)
  for _ in run_shards(job, configs, folder / "done" / "embed", runner, "embedding shards"):
    pass
  for split in SPLITS:
    for name in ARRAYS:
      ArrayStore(folder / split / name).commit()
  return configs

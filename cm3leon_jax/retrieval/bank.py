"""Writes embeddings of documents to disk, shard by shard, and reads them."""

# n documents, m documents of a shard, T tokens of a caption, E width of embeddings, including the
# lexical part.

from collections.abc import Callable
import dataclasses
import functools
import hashlib

from etils import epath
import numpy as np

from cm3leon_jax.clip import checkpoint
from cm3leon_jax.clip.huggingface import HFCLIP
from cm3leon_jax.clip.model import CLIP, CONFIG, normalize
from cm3leon_jax.config.build import build
from cm3leon_jax.config.tokenizers import CLIPConfig
from cm3leon_jax.data.documents.store import group_id
from cm3leon_jax.data.raw import reader
from cm3leon_jax.data.sources.records import SPLITS, RawPair
from cm3leon_jax.files.json_files import read_json, write_json
from cm3leon_jax.files.progress import progress_bar
from cm3leon_jax.retrieval import removed
from cm3leon_jax.retrieval.arrays import ArrayStore
from cm3leon_jax.retrieval.lexical import FILE as WORDS
from cm3leon_jax.retrieval.lexical import Lexical
from cm3leon_jax.stages import stages
from cm3leon_jax.stages.shards import Runner, forget, run_shards
from cm3leon_jax.tokenizers.text import TextTokenizer
from cm3leon_jax.vocab import VocabLayout

EMBED_CHUNK = 512
FOLDERS = {"train": "train", "bank": "train", "heldout": "heldout"}  # Split -> folder of arrays.
READ_THREADS = 8


def load_clip(folder: str, workdir: epath.PathLike, vocab: VocabLayout) -> CLIP | HFCLIP:
  """Loads a Hugging Face CLIP model from `folder`, or the CLIP of the run if `folder` is "".

  For errors, see `HFCLIP.load` and `CLIP.load`.
  """
  if folder:
    return HFCLIP.load(folder)
  workdir = epath.Path(workdir)
  return CLIP.load(workdir / "clip", TextTokenizer(workdir / "text_tokenizer", vocab).encode)


def embedding_width(folder: str, workdir: epath.PathLike) -> int:
  """Reads the embedding width of the model that `load_clip` loads. Only its config is read."""
  if folder:
    return checkpoint.read_config(folder).embed_dim
  stored = read_json(epath.Path(workdir) / "clip" / CONFIG, {"clip": dict})
  return build(CLIPConfig, stored["clip"], "clip").embed_dim


class Embeddings:
  """Embeddings of the pairs of one split, in the order of their document store.

  The folder of the split `train` holds the whole bank: first the pairs of the split `train`, then
  the pairs of the split `bank`.

  Attributes:
    documents: [n, E] float16 of norm 1: normalized means of caption and image embeddings (CM3Leon,
      section 2.1).
    groups: [n] uint64, see `store.group_id`. Near duplicates have the same group.
    keys: [n] uint64. Copies of a document have the same key.
  """

  def __init__(self, folder: epath.PathLike):
    """Opens the arrays. Raises UserError if `build_neighbors` has not written them."""
    self._folder = epath.Path(folder)
    stages.check_files(self._folder / ROWS)
    self.documents, self.groups, self.keys = (
      ArrayStore(self._folder / name) for name in ("documents", "groups", "keys")
    )

  def __len__(self) -> int:
    return len(self.documents)

  @functools.cached_property
  def queries(self) -> ArrayStore:
    """Embeddings of captions, [n, E] float16 of norm 1.

    In the split `train`, they are computed without the tokens that query dropout removes.
    """
    return ArrayStore(self._folder / "queries")

  @functools.cached_property
  def images(self) -> ArrayStore:
    """Image embeddings, [n, E] float16 of norm 1."""
    return ArrayStore(self._folder / "images")

  @property
  def first_bank(self) -> int:
    """Row of the first document of the split `bank`, or n if the split is empty."""
    return read_json(self._folder / ROWS, {"first_bank": int})["first_bank"]


ROWS = "rows.json"
COPY_BYTES = 4 * 2**20  # Size of a file of a copied bank, small enough for git.
ARRAYS = ("documents", "queries", "images", "groups", "keys")


def copy_bank(folder: epath.PathLike, to: epath.PathLike, train: bool) -> np.ndarray:
  """Copies the split `bank` of the files that `Retriever` reads, except for the search indices.

  If `train`, the training documents belong to the split `bank` of the copy. Removed documents are
  left out. Returns the indices of the copied documents among those that could be copied.
  """
  folder, to = epath.Path(folder), epath.Path(to)
  bank = Embeddings(folder / "train")
  first = 0 if train else bank.first_bank
  kept = np.setdiff1d(np.arange(first, len(bank)), removed.rows(folder))
  for name in ("documents", "groups", "keys"):
    rows = getattr(bank, name)[kept]
    store = ArrayStore.create(to / "train" / name, rows.shape[1:], rows.dtype, COPY_BYTES)
    store.append(rows)
  write_json(to / "train" / ROWS, {"first_bank": 0})
  if (folder / WORDS).exists():
    (folder / WORDS).copy(to / WORDS)
  return kept - first


@dataclasses.dataclass(frozen=True)
class EmbedJob:
  """Job of `shards.run_shards` that embeds the pairs of raw shards.

  Attributes:
    folder: folder in which {split}/ has the arrays of `Embeddings`.
    dropout: share of caption tokens that are dropped from queries of the split `train`.
    starts: split -> name of a shard -> row of the first pair of this shard.
  """

  raw: str
  folder: str
  load_clip: Callable[[], CLIP | HFCLIP]
  dropout: float
  seed: int
  starts: dict[str, dict[str, int]]
  load_lexical: Callable[[], Lexical] = Lexical

  def open(self) -> Callable[[str], dict]:
    """Loads the CLIP model. Returns a function that embeds the shard with a given name."""
    clip, lexical = self.load_clip(), self.load_lexical()

    def embed_shard(name: str) -> dict:
      digest = hashlib.sha256()
      for split in SPLITS:
        pairs = reader.read_shard(self.raw, name, RawPair, split)
        if pairs:
          dropout = self.dropout if split == "train" else 0.0
          rows = embed_pairs(clip, pairs, dropout, self.seed, lexical)
          for array, values in rows.items():
            store = ArrayStore(epath.Path(self.folder) / FOLDERS[split] / array)
            store.write(self.starts[split][name], values)
            digest.update(values.astype(store.dtype).tobytes())
      return {"digest": digest.hexdigest()}

    return embed_shard


def embed_pairs(
  clip: CLIP | HFCLIP, pairs: list[RawPair], dropout: float, seed: int, lexical: Lexical
) -> dict[str, np.ndarray]:
  """Computes the rows of `Embeddings` for m pairs, in float32."""
  encode = clip.encode
  assert encode is not None
  chunks: dict[str, list[np.ndarray]]
  chunks = {name: [] for name in ("documents", "queries", "images")}
  for start in progress_bar(range(0, len(pairs), EMBED_CHUNK), "embed", unit="chunk", leave=False):
    chunk = pairs[start : start + EMBED_CHUNK]
    captions = [p.caption for p in chunk]
    ids = [encode(caption) for caption in captions]
    texts = clip.embed_texts(ids)
    images = clip.embed_images(
      reader.load_images([p.image for p in chunk], clip.resolution, READ_THREADS)
    )
    chunks["documents"].append(lexical.join(document_embeddings(texts, images), captions))
    chunks["images"].append(lexical.join(images))
    if dropout and lexical.weight:
      captions = [drop_words(p.caption, dropout, p.key, seed) for p in chunk]
      texts = clip.embed_texts([encode(caption) for caption in captions])
    elif dropout:
      dropped = [drop_tokens(x, dropout, p.key, seed) for x, p in zip(ids, chunk)]
      texts = clip.embed_texts(dropped)
    chunks["queries"].append(lexical.join(texts, captions))
  rows = {name: np.concatenate(arrays) for name, arrays in chunks.items()}
  rows["groups"] = np.array([group_id(pair.group) for pair in pairs], np.uint64)
  rows["keys"] = np.array([group_id(pair.key) for pair in pairs], np.uint64)
  return rows


def document_embeddings(texts: np.ndarray, images: np.ndarray) -> np.ndarray:
  """Averages the embeddings of each caption and its image, [m, E] each, and normalizes the mean.

  text [1 0], image [0 1]: document [.7071 .7071]
  """
  return np.asarray(normalize((texts + images) / 2))


def drop_tokens(ids: np.ndarray, share: float, key: str, seed: int) -> np.ndarray:
  """Drops each id with probability `share`, but keeps at least one id.

  The choice depends only on `key` and `seed`.
  """
  digest = hashlib.sha256(key.encode()).digest()
  rng = np.random.default_rng([seed, int.from_bytes(digest[:8], "big")])
  order = rng.random(len(ids))
  kept = order >= share
  kept[np.argmax(order)] = True
  return ids[kept]


def drop_words(text: str, share: float, key: str, seed: int) -> str:
  """Drops words like `drop_tokens`, so that CLIP and the lexical part see the same text."""
  words = np.array(text.split(), object)
  return " ".join(drop_tokens(words, share, key, seed)) if len(words) else text


def embed(job: EmbedJob, width: int, inputs: dict, runner: Runner) -> dict:
  """Embeds new raw shards of all splits, and extends the arrays.

  Args:
    job: job that embeds a shard. Its `starts` are replaced; they are computed from the raw folder.
    width: E.
    inputs: identifies the CLIP model and the word counts. If it changes, all shards are embedded
      again.

  Returns:
    The config of each shard, which changes whenever the embeddings of the shard change.
  """
  raw, folder = reader.shards(job.raw), epath.Path(job.folder)
  starts: dict[str, dict[str, int]] = {split: {} for split in SPLITS}
  kept = True
  for split, others in (("train", ("bank",)), ("heldout", ())):
    count = 0
    for part in (split, *others):
      for name, shard in raw.items():
        starts[part][name], count = count, count + shard.get(f"{part}_pairs", 0)
    for name in ARRAYS:
      row, dtype = ((), np.uint64) if name in ("groups", "keys") else ((width,), np.float16)
      kept &= ArrayStore.prepare(folder / split / name, row, dtype, count)
  common = {"inputs": inputs, "width": width, "dropout": job.dropout, "seed": job.seed}
  configs = {}
  for name, shard in raw.items():
    # The first row of the split `bank` depends on the size of the split `train`. Only shards with
    # pairs of the split `bank` record this row, so the remaining shards are not embedded again if
    # it changes.
    splits = [split for split in SPLITS if split != "bank" or shard.get("bank_pairs")]
    first_rows = {split: starts[split][name] for split in splits}
    configs[name] = {**common, "digest": shard["digest"], "starts": first_rows}
  job = dataclasses.replace(job, starts=starts)
  done = folder / "done" / "embed"
  if not kept:
    forget(done, configs)
  made = dict(run_shards(job, configs, done, runner, "embedding shards"))
  digests = {name: made[name].get("digest") for name in configs}  # Digest of each shard's rows.
  for split in set(FOLDERS.values()):
    own = sum(shard.get(f"{split}_pairs", 0) for shard in raw.values())
    write_json(folder / split / ROWS, {"first_bank": own, "digests": digests})
    for name in ARRAYS:
      ArrayStore(folder / split / name).commit()
  return configs

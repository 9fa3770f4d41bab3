"""Appends vectors of words to CLIP embeddings of captions for hybrid search.

Hybrid search compares CLIP embeddings (dense) and also words (lexical).
"""

# m texts, E width of CLIP embeddings, X width of the lexical part.

from collections.abc import Callable, Sequence
import dataclasses
import functools
import hashlib
import math
import re

from etils import epath
import numpy as np

from cm3leon_jax.data.raw import reader
from cm3leon_jax.data.sources.records import RawPair
from cm3leon_jax.errors import UserError
from cm3leon_jax.files.atomic import replacing
from cm3leon_jax.files.digests import digest
from cm3leon_jax.files.json_files import read_json, write_json
from cm3leon_jax.stages import stages
from cm3leon_jax.stages.shards import Runner, run_shards

SCHEMA_VERSION = 1
FILE = "words.json"
WORD = re.compile(r"[^\W_]+")  # A sequence of letters and digits of any script.
BUCKETS = 2**18  # Number of hash buckets for counts. Words in one hash bucket share a frequency.
CACHED_WORDS = 2**16


def words(text: str) -> list[str]:
  """Returns the sorted distinct words of a text in lower case. Without words, returns [""].

  words("A red bell, a RED key") = ["a", "bell", "key", "red"], words("?") = [""]
  """
  return sorted(set(WORD.findall(text.lower()))) or [""]


@functools.lru_cache(CACHED_WORDS)
def bucket(word: str) -> int:
  """Returns the hash bucket of a word, in [0, `BUCKETS`)."""
  return int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "big") % BUCKETS


@functools.lru_cache(CACHED_WORDS)
def signs(word: str, width: int) -> np.ndarray:
  """Hashes a word to its vector, [X] int8 of -1 and 1.

  Random signs preserve inner products (Achlioptas 2003): the cosine of two different words has mean
  0 and standard deviation 1 / sqrt(X).
  """
  bits = np.frombuffer(hashlib.shake_256(word.encode()).digest(-(-width // 8)), np.uint8)
  vector = np.unpackbits(bits)[:width].astype(np.int8) * 2 - 1
  vector.flags.writeable = False
  return vector


def inverse_frequencies(counts: np.ndarray, documents: int) -> np.ndarray:
  """Computes positive float64 weights of words. `counts`: how many of N documents have a word.

  The weight is the inverse document frequency of BM25 (Robertson and Zaragoza 2009). As in Lucene,
  1 is added in the logarithm: ln(1 + (N - count + .5) / (count + .5)).

    N = 10, counts [0 1 10]: [3.0910 1.9924 .0465]
  """
  return np.log1p((documents - counts + 0.5) / (counts + 0.5))


@dataclasses.dataclass(frozen=True, eq=False)
class Lexical:
  """Appends word vectors (the lexical part) to CLIP embeddings. By default, appends nothing.

  Attributes:
    weight: w in [0, 1), weight of the lexical part in the cosine of a caption and a document.
    width: X.
    idf: [BUCKETS] float64, see `inverse_frequencies`.
  """

  weight: float = 0.0
  width: int = 0
  idf: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))

  def embed(self, texts: Sequence[str]) -> np.ndarray:
    """Embeds texts, as [m, X] float32: the weighted sum of the `signs` of their words, normalized.

    A word counts only once per text. If the sum is 0, it is replaced by the vector of the empty
    word.
    """
    rows = np.zeros((len(texts), self.width), np.float32)
    for row, text in zip(rows, texts):
      result = words(text)
      weights = self.idf[[bucket(word) for word in result]]
      vector = weights @ np.stack([signs(word, self.width) for word in result])
      vector = vector if vector.any() else signs("", self.width)
      row[:] = vector / np.linalg.norm(vector)
    return rows

  def knows(self, text: str) -> bool:
    """Returns whether a counted caption has a word of the text; True if none were counted."""
    least_frequent = self.idf.max(initial=0.0)  # Of words that no caption has.
    return not self.weight or any(self.idf[bucket(w)] < least_frequent for w in words(text))

  def join(self, embeddings: np.ndarray, texts: Sequence[str] | None = None) -> np.ndarray:
    """Appends lexical parts to CLIP embeddings. The results have norm 1.

      captions and documents: [sqrt(1 - w) CLIP, sqrt(w) words]
      images:                 [CLIP, 0]

    The cosine of a caption and a document is (1 - w) x CLIP's cosine + w x the cosine of their
    lexical parts. The cosine of an image and a document is sqrt(1 - w) x CLIP's cosine.

    Args:
      embeddings: [m, E] CLIP embeddings of norm 1.
      texts: m captions; None for images.

    Returns:
      [m, E + X] float32, or `embeddings` if the weight is 0.
    """
    if not self.weight:
      return embeddings
    if texts is None:
      return np.pad(embeddings, ((0, 0), (0, self.width)))
    sparse = math.sqrt(self.weight) * self.embed(texts)
    return np.concatenate([math.sqrt(1 - self.weight) * np.asarray(embeddings), sparse], axis=1)


def load(folder: epath.PathLike, weight: float, width: int) -> Lexical:
  """Loads the lexical part of a bank. Raises UserError if the bank has another weight or width."""
  path = epath.Path(folder) / FILE
  if not weight and not path.exists():
    return Lexical()
  stages.check_files(path)
  fields = {"schema_version": int, "weight": float, "width": int, "documents": int, "counts": dict}
  stored = read_json(path, fields)
  expected = {"schema_version": SCHEMA_VERSION, "weight": weight, "width": width}
  if changed := [f"{k} {stored[k]}, not {v}" for k, v in expected.items() if stored[k] != v]:
    raise UserError(
      f"{path} has {'; '.join(changed)}: set config.retrieval.lexical_weight and lexical_width to "
      f"the values of the bank, or delete {folder} and run `cm3leon build_neighbors`."
    )
  counts = np.zeros(BUCKETS, np.int64)
  counts[[int(b) for b in stored["counts"]]] = list(stored["counts"].values())
  return Lexical(weight, width, inverse_frequencies(counts, stored["documents"]))


@dataclasses.dataclass(frozen=True)
class _CountJob:
  """Job of `shards.run_shards` that counts the words of raw shards."""

  raw: str
  folder: str

  def open(self) -> Callable[[str], dict]:
    def count_shard(name: str) -> dict:
      captions = [
        pair.caption
        for split in ("train", "bank")
        for pair in reader.read_shard(self.raw, name, RawPair, split)
      ]
      result = [np.unique([bucket(word) for word in words(text)]) for text in captions]
      buckets, counts = np.unique(np.concatenate([*result, np.zeros(0)]), return_counts=True)
      with replacing(_shard_path(self.folder, name)) as file:
        np.save(file, np.stack([buckets, counts]).astype(np.int64))
      return {"documents": len(captions)}

    return count_shard


def _shard_path(folder: epath.PathLike, name: str) -> epath.Path:
  return epath.Path(folder) / "words" / f"{name}.npy"


def count_words(
  raw: str, folder: epath.PathLike, weight: float, width: int, runner: Runner
) -> dict[str, str]:
  """Counts how many captions of the bank have each word, and writes the counts for `load`.

  Counts of finished shards are reused. Shards that are added change the weights of all words.

  Args:
    folder: folder of the bank, where `FILE`, words/ (the counts of each shard) and done/words/ are
      written.
    weight: see `Lexical`. If it is 0, nothing is counted and `FILE` is deleted.
    width: X.

  Returns:
    {"words": digest of `FILE`}, or {} if the weight is 0. All embeddings depend on the digest.
  """
  folder = epath.Path(folder)
  if not weight:
    (folder / FILE).unlink(missing_ok=True)
    return {}
  shards = {name: {"digest": shard["digest"]} for name, shard in reader.shards(raw).items()}
  total, documents = np.zeros(BUCKETS, np.int64), 0
  job, done = _CountJob(raw, str(folder)), folder / "done" / "words"
  results = run_shards(
    job, shards, done, runner, "counting words", lambda name: _shard_path(folder, name).exists()
  )
  for name, numbers in results:
    with _shard_path(folder, name).open("rb") as file:
      buckets, counts = np.load(file)
    total[buckets] += counts
    documents += numbers["documents"]
  header = {"schema_version": SCHEMA_VERSION, "weight": weight, "width": width}
  result = {str(b): total[b] for b in np.flatnonzero(total)}
  write_json(folder / FILE, {**header, "documents": documents, "counts": result})
  return {"words": str(digest(folder / FILE))}

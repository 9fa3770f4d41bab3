"""Measures ScaNN and exact search for neighbors, the size of an index, and the selection rules.

  python -m benchmarks.search --folder=scratch --sizes=100000,1000000

The n random vectors have 512 dimensions and form clusters as embeddings do: there are n / 100
centers, and the cosine similarity of a vector and its center is about 0.7. ScaNN and exact search
use all cores. Their rates are printed per second of wall-clock time and per second of processor
time. The selection rules use one thread.
"""

import time

from absl import app, flags
from etils import epath
import numpy as np

from cm3leon_jax.retrieval import index
from cm3leon_jax.retrieval.arrays import ArrayStore
from cm3leon_jax.retrieval.bank import document_embeddings
from cm3leon_jax.retrieval.config import RetrievalConfig
from cm3leon_jax.retrieval.neighbors import Retriever

_SIZES = flags.DEFINE_list("sizes", ["100000", "1000000"], "Numbers of vectors.")
_QUERIES = flags.DEFINE_integer(
  "queries", 2_000, "Queries per repetition of ScaNN; exact search gets an eighth, recall a half."
)
_REPEATS = flags.DEFINE_integer(
  "repeats", 5, "Repetitions; their median, smallest and largest are printed."
)
_FOLDER = flags.DEFINE_string("folder", None, "Folder for arrays and indices.", required=True)

WIDTH = 512


def clustered(count: int, seed: int = 0) -> np.ndarray:
  """Returns random vectors [count, WIDTH] of norm 1 that form clusters."""
  rng = np.random.default_rng(seed)
  centers = rng.standard_normal((max(1, count // 100), WIDTH), np.float32)
  vectors = centers[rng.integers(0, len(centers), count)]
  vectors += rng.standard_normal((count, WIDTH), np.float32)
  return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def rates(search: index.ExactIndex | index.ScannIndex, queries: np.ndarray, repeats: int) -> str:
  """Measures the queries per second of wall-clock time and of processor time, after a warm-up.

  Returns a text with both rates, each as `median (smallest to largest)`.
  """
  search.search(queries, 2)
  measured = []
  for _ in range(repeats):
    start = np.array([time.perf_counter(), time.process_time()])
    search.search(queries, 2)
    elapsed = np.array([time.perf_counter(), time.process_time()]) - start
    measured.append(len(queries) / elapsed)
  wall, processor = (
    f"{np.median(x):,.0f} ({min(x):,.0f} to {max(x):,.0f})" for x in np.transpose(measured)
  )
  return f"{wall} queries/s, {processor} per processor second"


def measure(count: int) -> None:
  """Prints the size and recall of a ScaNN index of `count` vectors, and the search rates."""
  vectors = clustered(count)
  rng = np.random.default_rng(1)
  queries = vectors[rng.integers(0, count, _QUERIES.value)]
  queries = queries + 0.5 * rng.standard_normal((_QUERIES.value, WIDTH), np.float32) / 16
  queries /= np.linalg.norm(queries, axis=1, keepdims=True)
  start = time.process_time()
  scann = index.ScannIndex.build(vectors)
  built = time.process_time() - start
  folder = epath.Path(_FOLDER.value) / str(count)
  scann.save(folder)
  size = sum(path.stat().length for path in folder.iterdir())
  exact = index.ExactIndex(vectors)
  few, half = (queries[: max(1, len(queries) // divisor)] for divisor in (8, 2))
  recall = index.recall_at_k(scann.search(half, 2)[0], exact.search(half, 2)[0])
  print(
    f"{count:,} vectors: scann built in {built:.0f} processor seconds, {size / count:.0f} bytes a "
    f"vector, recall@2 {recall:.3f}",
    flush=True,
  )
  print(f"  scann: {rates(scann, queries, _REPEATS.value)}", flush=True)
  print(f"  exact: {rates(exact, few, _REPEATS.value)}", flush=True)


def measure_selection(count: int = 20_000) -> None:
  """Prints the speed of the selection rules in documents/s, with 2 x 64 candidates each."""
  texts, images = clustered(count), clustered(count, seed=1)
  folder = epath.Path(_FOLDER.value) / "selection"
  numbers = np.arange(count, dtype=np.uint64) + 1
  arrays = {"documents": document_embeddings(texts, images), "queries": texts, "images": images}
  for name, values in {**arrays, "groups": numbers // 2 + 1, "keys": numbers}.items():
    dtype = values.dtype if values.ndim == 1 else np.float16
    ArrayStore.create(folder / "train" / name, values.shape[1:], dtype).append(values)
  retriever = Retriever(folder, RetrievalConfig(backend="exact"))
  queries = slice(0, 2_048)
  sides = [retriever.search(x[queries]) for x in (texts, images)]
  rows = [x[queries] for x in (arrays["documents"], numbers, numbers // 2 + 1)]
  measured = []
  for _ in range(_REPEATS.value):
    start = time.perf_counter()
    retriever.select(sides, *rows, kept_per_side=2)
    measured.append(len(rows[0]) / (time.perf_counter() - start))
  print(
    f"selection: {np.median(measured):,.0f} "
    f"({min(measured):,.0f} to {max(measured):,.0f}) documents/s",
    flush=True,
  )


def main(_):
  measure_selection()
  for size in _SIZES.value:
    measure(int(size))


if __name__ == "__main__":
  app.run(main)

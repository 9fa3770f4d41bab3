"""Finds the vectors with the largest inner products, exactly or with ScaNN."""

# n vectors in the index, q queries, m results of a search, E width of a vector, k best results.

from collections.abc import Sequence
import functools
import tempfile
import types
from typing import Any, TypeAlias

from etils import epath
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int32
import numpy as np

from cm3leon_jax.errors import UserError
from cm3leon_jax.files.rewritten import rewriting
from cm3leon_jax.retrieval.arrays import ArrayStore
from cm3leon_jax.stages import stages

EXACT_BELOW = 1_000  # Number of vectors below which an index costs more than it saves.
QUERY_BATCH = 256
LARGE = 100_000  # From this size on, `ScannIndex` uses two leaves per vector, and 8-bit vectors.
EXACT_ROWS = 1_000_000  # Number of vectors that exact search holds in memory at a time.
BLOCK = 65_536  # Number of vectors that a device multiplies with a batch of queries at a time.


Found: TypeAlias = tuple[Float[Array, "q _"], Int32[Array, "q _"]]  # Scores and ids.
ASSETS = "scann_assets.pbtxt"  # File of a ScaNN index that lists its other files.


class ExactIndex:
  """Exact search in JAX. Vectors are sharded over devices. All query batches have one shape."""

  backend = "exact"

  def __init__(
    self,
    vectors: np.ndarray,
    devices: Sequence[jax.Device] | None = None,
    query_batch: int = QUERY_BATCH,
  ):
    """Puts vectors [n, E] on `devices`, by default on all. Batches have `query_batch` queries."""
    self._query_batch = query_batch
    devices = jax.devices() if devices is None else devices
    vectors = np.ascontiguousarray(vectors, np.float32)
    self._count, width = vectors.shape
    rows = -(-self._count // len(devices))
    block = min(rows, BLOCK)
    rows = -(-rows // block) * block
    padded = np.pad(vectors, ((0, len(devices) * rows - self._count), (0, 0)))
    self._mesh = mesh = jax.make_mesh((len(devices),), ("bank",), (AxisType.Auto,), devices=devices)
    self._vectors = jax.device_put(padded.reshape(-1, block, width), NamedSharding(mesh, P("bank")))
    self._top_k = functools.partial(_exact_top_k, mesh, self._count)

  def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Finds, for each of the queries [q, E], the k vectors with the largest inner products.

    Returns ids [q, k] int32, padded with -1, and inner products [q, k] float32, padded with -inf.
    The best vector is first. Equal scores are ordered by id.
    """
    queries = np.ascontiguousarray(queries, np.float32)
    kept = min(k, self._count)
    ids, scores = [np.zeros((0, kept), np.int32)], [np.zeros((0, kept), np.float32)]
    for start in range(0, len(queries), self._query_batch):
      batch = queries[start : start + self._query_batch]
      padded = np.pad(batch, ((0, self._query_batch - len(batch)), (0, 0)))
      with jax.set_mesh(self._mesh):  # The caller may have set the mesh of the decoder.
        top_scores, top_ids = self._top_k(kept, self._vectors, padded)
      ids.append(np.asarray(top_ids)[: len(batch)])
      scores.append(np.asarray(top_scores)[: len(batch)])
    return _fill(np.concatenate(ids), np.concatenate(scores), k)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _exact_top_k(
  mesh: jax.sharding.Mesh,
  count: int,
  k: int,
  vectors: Float[Array, "blocks block E"],
  queries: Float[Array, "q E"],
) -> Found:
  """Searches vectors [blocks, block, E], sharded by blocks. Vectors after `count` are padding."""
  block = vectors.shape[1]

  def local(blocks: Float[Array, "b block E"], queries: Float[Array, "q E"]) -> Found:
    first = jax.lax.axis_index("bank") * len(blocks)
    empty = jnp.full((len(queries), k), -jnp.inf), jnp.full((len(queries), k), -1, jnp.int32)

    def step(best: Found, xs: tuple[Array, Array]) -> tuple[Found, None]:
      number, vectors = xs
      ids = number * block + jnp.arange(block, dtype=jnp.int32)
      products = jnp.where(ids < count, jnp.dot(queries, vectors.T, precision="highest"), -jnp.inf)
      return top_k(best, (products, jnp.broadcast_to(ids, products.shape)), k), None

    numbers = first + jnp.arange(len(blocks), dtype=jnp.int32)
    return jax.lax.scan(step, jax.lax.pcast(empty, "bank", to="varying"), (numbers, blocks))[0]

  spread = jax.shard_map(local, mesh=mesh, in_specs=(P("bank"), P()), out_specs=P(None, "bank"))
  scores, ids = spread(vectors, queries)
  nothing = jnp.zeros((len(queries), 0))
  return top_k((scores, ids), (nothing, nothing.astype(jnp.int32)), k)


def top_k(first: Found, second: Found, k: int) -> Found:
  """Returns the k best of two results, each with scores and ids [q, m]. Ties keep their order."""
  scores, ids = (jnp.concatenate(pair, axis=1) for pair in zip(first, second))
  best, places = jax.lax.top_k(scores, k)
  return best, jnp.take_along_axis(ids, places, 1)


class ScannIndex:
  """Search with ScaNN (Guo et al. 2020): a tree of partitions, hashes in its leaves, and rescoring.

  The tree has about sqrt(n) leaves. A search visits a third of the leaves, but at most 64. It
  rescores the best max(256, 4k) candidates with their exact vectors. If there are at least `LARGE`
  vectors, every vector is in two leaves (SOAR, Sun et al. 2023). A search then visits
  max(60, leaves / 200) leaves, and rescores the best max(128, 2k) candidates with 8-bit vectors.
  """

  backend = "scann"

  def __init__(self, searcher: Any, count: int):
    """Wraps a ScaNN searcher over `count` vectors. Call `build` or `load` instead."""
    self._searcher, self._count = searcher, count

  @classmethod
  def build(cls, vectors: np.ndarray) -> "ScannIndex":
    """Builds the index of `vectors`, [n, E]."""
    vectors = np.ascontiguousarray(vectors, np.float32)
    n = len(vectors)
    leaves, searched = _leaves(n)
    builder = _scann().builder(vectors, min(64, n), "dot_product")
    builder = builder.tree(
      leaves,
      searched,
      training_sample_size=min(n, 250_000),
      soar_lambda=1.5 if n >= LARGE else None,
    )
    builder = builder.score_ah(2, anisotropic_quantization_threshold=0.2)
    return cls(builder.reorder(min(256, n), quantize=n >= LARGE).build(), n)

  def save(self, folder: epath.PathLike) -> None:
    """Writes the index to `folder`, which may be in a GCS bucket and may be moved later."""
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as local:  # ScaNN writes only to local disks.
      self._searcher.serialize(local, relative_path=True)
      for path in epath.Path(local).iterdir():
        with rewriting(folder / path.name) as partial:
          path.copy(partial, overwrite=True)

  @classmethod
  def load(cls, folder: epath.PathLike, count: int) -> "ScannIndex":
    """Reads an index of `count` vectors that `save` wrote. Raises UserError if it is absent."""
    folder = epath.Path(folder)
    stages.check_files(folder)
    if not (folder / ASSETS).exists():
      raise UserError(f"{folder} contains no index: run `cm3leon build_neighbors` again.")
    if "://" not in str(folder):
      return cls(_scann().load_searcher(str(folder.resolve())), count)
    with tempfile.TemporaryDirectory() as local:
      for path in folder.iterdir():
        path.copy(epath.Path(local) / path.name)
      return cls(_scann().load_searcher(local), count)

  def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """See `ExactIndex.search`. Equal scores may have any order."""
    n = self._count
    # A batch even for a single query, because ScaNN's call for one query quantizes differently. The
    # batched call also uses all cores.
    ids, scores = self._searcher.search_batched_parallel(
      np.ascontiguousarray(queries, np.float32),
      final_num_neighbors=min(k, n),
      pre_reorder_num_neighbors=min(n, max(128, 2 * k) if n >= LARGE else max(256, 4 * k)),
      leaves_to_search=_leaves(n)[1],
    )
    missing = np.isnan(scores)
    ids = np.where(missing, -1, np.asarray(ids, np.int64)).astype(np.int32)
    return _fill(ids, np.where(missing, -np.inf, scores).astype(np.float32), k)


def _leaves(n: int) -> tuple[int, int]:
  """Returns the number of leaves of a tree over n vectors, and how many of them a search visits."""
  leaves = max(1, round(n**0.5))
  most = max(60, leaves // 200) if n >= LARGE else 64
  return leaves, min(most, -(-leaves // 3))


class BlockIndex:
  """Searches a bank of any size block by block. Only the index of one block is in memory."""

  def __init__(
    self,
    documents: np.ndarray | ArrayStore,
    backend: str,
    folder: epath.PathLike,
    rows: int,
    first: int = 0,
    query_batch: int = QUERY_BATCH,
  ):
    """Splits the bank into blocks.

    Args:
      documents: embeddings [n, E] of norm 1, as an array or an `ArrayStore`.
      backend: "scann" or "exact", see `choose_backend`.
      folder: folder of the ScaNN indices. Exact search does not use it.
      rows: number of documents in a block. Blocks of exact search have at most `EXACT_ROWS`.
      first: first row of `documents` to search. Ids count from row 0 of `documents`.
      query_batch: number of queries in a batch of exact search. The last batch is padded.
    """
    self._query_batch = query_batch
    self._documents, self.backend, self._folder = documents, backend, epath.Path(folder)
    n, rows = len(documents), rows if backend == "scann" else min(rows, EXACT_ROWS)
    self.blocks = [(start, min(start + rows, n)) for start in range(first, n, rows)]
    self._load = functools.lru_cache(1)(self._open)

  def build_block(self, block: int) -> None:
    """Builds and saves the ScaNN index of one block."""
    start, stop = self.blocks[block]
    ScannIndex.build(self._documents[start:stop]).save(self._block_folder(block))

  def has_block(self, name: str) -> bool:
    """Returns whether the index of a block exists. `name` is the number of the block as text."""
    return (self._block_folder(int(name)) / ASSETS).exists()

  def _block_folder(self, block: int) -> epath.Path:
    return self._folder / f"{block:06d}"

  def _open(self, block: int) -> ExactIndex | ScannIndex:
    start, stop = self.blocks[block]
    if self.backend == "exact":
      return ExactIndex(self._documents[start:stop], query_batch=self._query_batch)
    return ScannIndex.load(self._block_folder(block), stop - start)

  def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """See `ExactIndex.search`. Equal scores may have any order."""
    best = np.full((len(queries), 0), -1, np.int32), np.zeros((len(queries), 0), np.float32)
    for block, (start, _) in enumerate(self.blocks):
      ids, scores = self._load(block).search(queries, k)
      best = merge([best, (np.where(ids >= 0, ids + start, -1), scores)], k)
    return best


def merge(results: list[tuple[np.ndarray, np.ndarray]], k: int) -> tuple[np.ndarray, np.ndarray]:
  """Merges the results of several searches of the same queries: ids and scores [q, k].

    results = ([[4 7]], [[.9 .2]]), ([[8 -1]], [[.5 -inf]]), k = 3
    merged  = [[4 8 7]], [[.9 .5 .2]]

  Args:
    results: ids and scores [q, m] of each search. Ids are rows of the bank. -1 is padding.
    k: number of results per query, at most the sum of all m.
  """
  ids, scores = (np.concatenate(arrays, axis=1) for arrays in zip(*results))
  order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
  return np.take_along_axis(ids, order, 1), np.take_along_axis(scores, order, 1)


def choose_backend(count: int, backend: str = "auto") -> str:
  """Chooses the search backend for `count` vectors. "auto" is ScaNN for 1,000 or more vectors.

  Raises:
    UserError: there are no vectors, or ScaNN is not installed.
  """
  if not count:
    raise UserError(
      "the bank of neighbors is empty; retrieval needs at least one train pair, or one pair of the "
      "split bank if config.retrieval.train_documents is False."
    )
  if backend == "auto":
    backend = "exact" if count < EXACT_BELOW else "scann"
  if backend == "scann":
    _scann()
  return backend


def recall_at_k(ids: np.ndarray, exact_ids: np.ndarray) -> float:
  """Computes the share of `exact_ids` that also occur in the same row of `ids`, both [q, k].

  ids = [[2 1] [3 9]], exact_ids = [[1 2] [3 4]]: 0.75
  """
  return float((exact_ids[:, :, None] == ids[:, None, :]).any(-1).mean())


def _scann() -> types.ModuleType:
  try:
    from scann import scann_ops_pybind
  except ImportError as error:
    raise UserError(
      f"ScaNN cannot be imported ({error}): install `scann` (no wheel exists for macOS on ARM), or "
      "set config.retrieval.backend to 'exact'."
    ) from error
  return scann_ops_pybind


def _fill(ids: np.ndarray, scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
  more = ((0, 0), (0, k - ids.shape[1]))
  return np.pad(ids, more, constant_values=-1), np.pad(scores, more, constant_values=-np.inf)

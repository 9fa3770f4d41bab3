"""Maximum-inner-product search: which of n vectors are nearest to a query, exactly or with ScaNN."""

# n vectors in the index, q queries, E width of a vector, k nearest that are asked for.

from collections.abc import Callable
import functools
from typing import Protocol

from etils import epath
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from cm3leon_jax.config import UserError

BACKENDS = ("auto", "scann", "exact")
EXACT_BELOW = 1_000  # vectors; below, an index costs more than it saves.
QUERY_BATCH = 256
BLOCK = 65_536  # vectors whose products with a batch of queries exist at the same time on a device.


class Index(Protocol):
  """What every search offers."""

  backend: str

  def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """[q, E] -> ids [q, k] int32 and inner products [q, k] float32, best first; -1 and -inf where there are fewer than k."""
    ...


class ExactIndex:
  """A matrix product and top-k in JAX, `QUERY_BATCH` queries at a time, the vectors split over the devices."""

  backend = "exact"

  def __init__(self, vectors: np.ndarray, devices=None):
    """Takes vectors [n, E] and the devices that hold them (default: all)."""
    devices = jax.devices() if devices is None else devices
    vectors = _matrix(vectors, "vectors")
    self._count, width = vectors.shape
    rows = -(-self._count // len(devices))
    block = min(rows, BLOCK)
    rows = -(-rows // block) * block
    padded = np.pad(vectors, ((0, len(devices) * rows - self._count), (0, 0)))
    mesh = jax.make_mesh((len(devices),), ("bank",), (AxisType.Auto,), devices=devices)
    self._vectors = jax.device_put(padded.reshape(-1, block, width), NamedSharding(mesh, P("bank")))
    self._top_k = functools.partial(_exact_top_k, mesh, self._count)

  def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """See `Index.search`; equal scores come in the order of their ids."""
    queries = _matrix(queries, "queries")
    kept = min(k, self._count)
    ids, scores = [np.zeros((0, kept), np.int32)], [np.zeros((0, kept), np.float32)]
    for start in range(0, len(queries), QUERY_BATCH):
      batch = queries[start : start + QUERY_BATCH]
      padded = np.pad(batch, ((0, QUERY_BATCH - len(batch)), (0, 0)))
      top_scores, top_ids = self._top_k(kept, self._vectors, padded)
      ids.append(np.asarray(top_ids)[: len(batch)])
      scores.append(np.asarray(top_scores)[: len(batch)])
    return _fill(np.concatenate(ids), np.concatenate(scores), k)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _exact_top_k(mesh, count, k, vectors, queries):
  """vectors [blocks, block, E], split over the mesh by blocks; `count` of them exist. Returns scores and ids [q, k]."""
  block = vectors.shape[1]

  def local(blocks, queries):
    first = jax.lax.axis_index("bank") * len(blocks)
    empty = jnp.full((len(queries), k), -jnp.inf), jnp.full((len(queries), k), -1, jnp.int32)

    def step(best, xs):
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


def top_k(first, second, k: int):
  """The k best of two lists of (scores, ids), each [q, m]; of equal scores, those of the first list and place come first."""
  scores, ids = (jnp.concatenate(pair, axis=1) for pair in zip(first, second))
  best, places = jax.lax.top_k(scores, k)
  return best, jnp.take_along_axis(ids, places, 1)


class ScannIndex:
  """ScaNN (Guo et al. 2020): a tree of partitions, anisotropic hashing in the leaves, better scores for the best of them.

  There are about sqrt(n) leaves; a third of them is searched, but not more than 64 until those are less than a hundredth. At
  least 256 candidates (and 4k) are scored again: with their vectors, or from `INT8_FROM` vectors on with 8 bits a number, which
  takes a quarter of the memory.
  """

  backend = "scann"
  INT8_FROM = 100_000

  def __init__(self, vectors: np.ndarray, folder: epath.PathLike | None = None):
    """Trains on `vectors` [n, E]; with `folder`, loads what `save` wrote there and `vectors` only tells n."""
    ops = _scann()
    vectors = _matrix(vectors, "vectors")
    self._count = n = len(vectors)
    leaves = max(1, round(n**0.5))
    self._leaves_to_search = max(min(64, -(-leaves // 3)), leaves // 100)
    if folder is not None:
      self._searcher = ops.load_searcher(_absolute(folder))
      return
    builder = ops.builder(vectors, min(64, n), "dot_product")
    builder = builder.tree(leaves, self._leaves_to_search, training_sample_size=min(n, 250_000))
    builder = builder.score_ah(2, anisotropic_quantization_threshold=0.2)
    self._searcher = builder.reorder(min(256, n), quantize=n >= self.INT8_FROM).build()

  def save(self, folder: epath.PathLike) -> None:
    folder = _absolute(folder)
    epath.Path(folder).mkdir(parents=True, exist_ok=True)
    self._searcher.serialize(folder)

  def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """See `Index.search`."""
    n = self._count
    # Only the batched call: the single one quantises otherwise and disagrees on some queries.
    ids, scores = self._searcher.search_batched(
      _matrix(queries, "queries"),
      final_num_neighbors=min(k, n),
      pre_reorder_num_neighbors=min(n, max(256, 4 * k)),
      leaves_to_search=self._leaves_to_search,
    )
    missing = np.isnan(scores)
    ids = np.where(missing, -1, np.asarray(ids, np.int64)).astype(np.int32)
    return _fill(ids, np.where(missing, -np.inf, scores).astype(np.float32), k)


class ShardedIndex:
  """One index per shard of the vectors, their results merged by score."""

  def __init__(self, vectors: np.ndarray, shard_size: int, build: Callable[[np.ndarray], Index]):
    """Builds an index of every `shard_size` vectors of [n, E]; the last shard has what is left."""
    self._starts = range(0, len(vectors), shard_size)
    self._indices = [build(vectors[start : start + shard_size]) for start in self._starts]
    self.backend = self._indices[0].backend

  def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """See `Index.search`."""
    found = []
    for start, index in zip(self._starts, self._indices):
      ids, scores = index.search(queries, k)
      found.append((np.where(ids >= 0, ids + start, -1), scores))
    return merge(found, k)


def merge(found: list[tuple[np.ndarray, np.ndarray]], k: int) -> tuple[np.ndarray, np.ndarray]:
  """The k best of several searches of the same queries: ids and scores [q, k].

    ids [[4, 7]] with scores [[.9, .2]], and [[8, 9]] with [[.5, .1]], k = 3: [[4, 8, 7]] with [[.9, .5, .2]]

  Args:
    found: ids and scores [q, m] of each search, ids counted over the whole bank, -1 where there is nothing.
    k: how many are kept, at most the sum of the m.
  """
  ids, scores = (np.concatenate(parts, axis=1) for parts in zip(*found))
  order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
  return np.take_along_axis(ids, order, 1), np.take_along_axis(scores, order, 1)


def build_index(vectors: np.ndarray, backend: str = "auto", shard_size: int = 5_000_000) -> Index:
  """Builds the search over `vectors`.

  Args:
    vectors: [n, E] float.
    backend: "scann", "exact", or "auto": ScaNN from 1,000 vectors on, exact search below.
    shard_size: vectors of one ScaNN index; more are searched in several.

  Raises:
    UserError: an unknown backend, no vectors, or ScaNN is not installed.
  """
  if backend not in BACKENDS:
    raise UserError(f"retrieval.backend is '{backend}'; it must be one of {', '.join(BACKENDS)}.")
  if backend == "auto":
    backend = "exact" if len(vectors) < EXACT_BELOW else "scann"
    if backend == "exact":
      print(f"index: exact search, for {len(vectors)} vectors are fewer than {EXACT_BELOW}.", flush=True)
  if backend == "exact":
    return ExactIndex(vectors)
  return ScannIndex(vectors) if len(vectors) <= shard_size else ShardedIndex(vectors, shard_size, ScannIndex)


def recall_at_k(ids: np.ndarray, exact_ids: np.ndarray) -> float:
  """Share of the exact search's ids [q, k] that `ids` [q, k] holds in the same row, in any order."""
  if ids.shape != exact_ids.shape:
    raise ValueError(f"ids are {ids.shape}, the exact ones {exact_ids.shape}; both must be [q, k].")
  return float((exact_ids[:, :, None] == ids[:, None, :]).any(-1).mean())


def _scann():
  try:
    from scann import scann_ops_pybind
  except ImportError as error:
    raise UserError(
      f"ScaNN cannot be imported ({error}): install `scann` (no wheel exists for macOS on ARM), or set "
      "config.retrieval.backend to 'exact'."
    ) from error
  return scann_ops_pybind


def _absolute(folder: epath.PathLike) -> str:
  # An index that was serialised under a relative path cannot be loaded.
  return str(epath.Path(folder).resolve())


def _matrix(values, what: str) -> np.ndarray:
  values = np.ascontiguousarray(values, np.float32)
  if values.ndim != 2 or not values.shape[1] or (what == "vectors" and not len(values)):
    raise UserError(f"{what} of the index have shape {values.shape}; they must be a non-empty matrix [n, E].")
  return values


def _fill(ids, scores, k: int) -> tuple[np.ndarray, np.ndarray]:
  more = ((0, 0), (0, k - ids.shape[1]))
  return np.pad(ids, more, constant_values=-1), np.pad(scores, more, constant_values=-np.inf)

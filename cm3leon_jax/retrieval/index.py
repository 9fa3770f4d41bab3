"""Maximum-inner-product search: which of n vectors are nearest to a query, exactly or with ScaNN."""

# n vectors in the index, q queries, E width of a vector, k nearest that are asked for.

import functools
import tempfile
from typing import Literal, Protocol

from etils import epath
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from cm3leon_jax.config import UserError

Backend = Literal["auto", "scann", "exact"]
EXACT_BELOW = 1_000  # vectors; below, an index costs more than it saves.
QUERY_BATCH = 256
EXACT_ROWS = 1_000_000  # vectors that exact search holds at a time
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
    self._mesh = mesh = jax.make_mesh((len(devices),), ("bank",), (AxisType.Auto,), devices=devices)
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
      with jax.set_mesh(self._mesh):  # The caller may be on the decoder's mesh.
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

  def __init__(self, searcher, count: int):
    """Takes ScaNN's searcher over `count` vectors; see `build` and `load`."""
    self._searcher, self._count = searcher, count

  @classmethod
  def build(cls, vectors: np.ndarray) -> "ScannIndex":
    """Trains on `vectors` [n, E]."""
    vectors = _matrix(vectors, "vectors")
    n = len(vectors)
    leaves, searched = _leaves(n)
    builder = _scann().builder(vectors, min(64, n), "dot_product")
    builder = builder.tree(leaves, searched, training_sample_size=min(n, 250_000))
    builder = builder.score_ah(2, anisotropic_quantization_threshold=0.2)
    return cls(builder.reorder(min(256, n), quantize=n >= cls.INT8_FROM).build(), n)

  def save(self, folder: epath.PathLike) -> None:
    """Writes the index into `folder`, which may be moved, or lie in a bucket."""
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as local:  # ScaNN writes to local disks only.
      self._searcher.serialize(local, relative_path=True)
      for path in epath.Path(local).iterdir():
        path.copy(folder / path.name, overwrite=True)

  @classmethod
  def load(cls, folder: epath.PathLike, count: int) -> "ScannIndex":
    """What `save` wrote of an index of `count` vectors. Raises UserError if nothing is there."""
    folder = epath.Path(folder)
    if not (folder / "scann_assets.pbtxt").exists():
      raise UserError(f"{folder} holds no index: run `python -m launch.build_neighbors` again.")
    if "://" not in str(folder):
      return cls(_scann().load_searcher(str(folder.resolve())), count)
    with tempfile.TemporaryDirectory() as local:
      for path in folder.iterdir():
        path.copy(epath.Path(local) / path.name)
      return cls(_scann().load_searcher(local), count)

  def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """See `Index.search`."""
    n = self._count
    # Never the call for one query: it quantises otherwise and disagrees on some. This one uses all cores.
    ids, scores = self._searcher.search_batched_parallel(
      _matrix(queries, "queries"),
      final_num_neighbors=min(k, n),
      pre_reorder_num_neighbors=min(n, max(256, 4 * k)),
      leaves_to_search=_leaves(n)[1],
    )
    missing = np.isnan(scores)
    ids = np.where(missing, -1, np.asarray(ids, np.int64)).astype(np.int32)
    return _fill(ids, np.where(missing, -np.inf, scores).astype(np.float32), k)


def _leaves(n: int) -> tuple[int, int]:
  """Leaves of a tree over n vectors, and how many of them are searched."""
  leaves = max(1, round(n**0.5))
  return leaves, max(min(64, -(-leaves // 3)), leaves // 100)


class BlockIndex:
  """Search over a bank of any size, block after block, results merged by score; a block's index is loaded when it is needed."""

  def __init__(self, documents, backend: str, folder: epath.PathLike, rows: int):
    """Opens the search.

    Args:
      documents: [n, E] of norm 1, an array or an `ArrayStore`.
      backend: "scann" or "exact", see `choose_backend`.
      folder: of the blocks' ScaNN indices, one folder each; exact search needs none.
      rows: documents of one ScaNN index; exact search takes at most `EXACT_ROWS` at a time.
    """
    self._documents, self.backend, self._folder = documents, backend, epath.Path(folder)
    n, rows = len(documents), rows if backend == "scann" else min(rows, EXACT_ROWS)
    self.blocks = [(start, min(start + rows, n)) for start in range(0, n, rows)]
    self._load = functools.lru_cache(1)(self._open)

  def build_block(self, block: int) -> None:
    """Builds and saves the ScaNN index of one block."""
    start, stop = self.blocks[block]
    ScannIndex.build(self._documents[start:stop]).save(self._block_folder(block))

  def _block_folder(self, block: int) -> epath.Path:
    return self._folder / f"{block:06d}"

  def _open(self, block: int) -> Index:
    start, stop = self.blocks[block]
    if self.backend == "exact":
      return ExactIndex(self._documents[start:stop])
    return ScannIndex.load(self._block_folder(block), stop - start)

  def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """See `Index.search`."""
    best = np.full((len(queries), 0), -1, np.int32), np.zeros((len(queries), 0), np.float32)
    for block, (start, _) in enumerate(self.blocks):
      ids, scores = self._load(block).search(queries, k)
      best = merge([best, (np.where(ids >= 0, ids + start, -1), scores)], k)
    return best


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


def choose_backend(count: int, backend: str = "auto") -> str:
  """The search for `count` vectors: with "auto", ScaNN from 1,000 on, exact search below.

  Raises:
    UserError: no vectors, or ScaNN is not installed.
  """
  if not count:
    raise UserError("the bank of neighbors is empty; retrieval needs at least one train pair.")
  if backend == "auto":
    backend = "exact" if count < EXACT_BELOW else "scann"
  if backend == "scann":
    _scann()
  return backend


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


def _matrix(values, what: str) -> np.ndarray:
  values = np.ascontiguousarray(values, np.float32)
  if values.ndim != 2 or not values.shape[1] or (what == "vectors" and not len(values)):
    raise UserError(
      f"{what} of the index have shape {values.shape}; they must be a non-empty matrix [n, E]."
    )
  return values


def _fill(ids, scores, k: int) -> tuple[np.ndarray, np.ndarray]:
  more = ((0, 0), (0, k - ids.shape[1]))
  return np.pad(ids, more, constant_values=-1), np.pad(scores, more, constant_values=-np.inf)

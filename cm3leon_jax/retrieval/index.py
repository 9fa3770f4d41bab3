"""Maximum-inner-product search: which of n vectors are nearest to a query, exactly or with ScaNN."""

# n vectors in the index, q queries, E width of a vector, k nearest that are asked for.

from typing import Protocol

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np

from cm3leon_jax.config import UserError

BACKENDS = ("auto", "scann", "exact")
EXACT_BELOW = 1_000  # vectors; below, an index costs more than it saves.
QUERY_BATCH = 256


class Index(Protocol):
  """What both searches offer."""

  backend: str

  def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """[q, E] -> ids [q, k] int32 and inner products [q, k] float32, best first; -1 and -inf where there are fewer than k."""
    ...


class ExactIndex:
  """A matrix product and top-k in JAX, `QUERY_BATCH` queries at a time."""

  backend = "exact"

  def __init__(self, vectors: np.ndarray):
    self._vectors = jnp.asarray(_matrix(vectors, "vectors"))

  def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """See `Index.search`; equal scores come in the order of their ids."""
    queries = _matrix(queries, "queries")
    n = len(self._vectors)
    ids, scores = [np.zeros((0, min(k, n)), np.int32)], [np.zeros((0, min(k, n)), np.float32)]
    for start in range(0, len(queries), QUERY_BATCH):
      batch = queries[start : start + QUERY_BATCH]
      padded = np.pad(batch, ((0, QUERY_BATCH - len(batch)), (0, 0)))
      top_scores, top_ids = _exact_top_k(self._vectors, padded, min(k, n))
      ids.append(np.asarray(top_ids)[: len(batch)])
      scores.append(np.asarray(top_scores)[: len(batch)])
    return _fill(np.concatenate(ids), np.concatenate(scores), k)


@jax.jit(static_argnums=2)
def _exact_top_k(vectors, queries, k):
  return jax.lax.top_k(jnp.dot(queries, vectors.T, precision="highest"), k)


class ScannIndex:
  """ScaNN (Guo et al. 2020): a tree of partitions, anisotropic hashing in the leaves, exact scores for the best of them.

  There are about sqrt(n) leaves; a third of them is searched, but not more than 64 until those are less than a hundredth. At
  least 256 candidates (and 4k) are scored again with their full vectors.
  """

  backend = "scann"

  def __init__(self, vectors: np.ndarray, folder: epath.PathLike | None = None):
    """Trains on `vectors` [n, E]; with `folder`, loads what `save` wrote there and `vectors` only tells n."""
    ops = _scann()
    self._vectors = _matrix(vectors, "vectors")
    n = len(self._vectors)
    leaves = max(1, round(n**0.5))
    self._leaves_to_search = max(min(64, -(-leaves // 3)), leaves // 100)
    if folder is not None:
      self._searcher = ops.load_searcher(_absolute(folder))
      return
    builder = ops.builder(self._vectors, min(64, n), "dot_product")
    builder = builder.tree(leaves, self._leaves_to_search, training_sample_size=min(n, 250_000))
    self._searcher = builder.score_ah(2, anisotropic_quantization_threshold=0.2).reorder(min(256, n)).build()

  def save(self, folder: epath.PathLike) -> None:
    folder = _absolute(folder)
    epath.Path(folder).mkdir(parents=True, exist_ok=True)
    self._searcher.serialize(folder)

  def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """See `Index.search`."""
    n = len(self._vectors)
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


def build_index(vectors: np.ndarray, backend: str = "auto") -> Index:
  """Builds the search over `vectors`.

  Args:
    vectors: [n, E] float.
    backend: "scann", "exact", or "auto": ScaNN from 1,000 vectors on, exact search below.

  Raises:
    UserError: an unknown backend, no vectors, or ScaNN is not installed.
  """
  if backend not in BACKENDS:
    raise UserError(f"retrieval.backend is '{backend}'; it must be one of {', '.join(BACKENDS)}.")
  if backend == "auto":
    backend = "exact" if len(vectors) < EXACT_BELOW else "scann"
    if backend == "exact":
      print(f"index: exact search, for {len(vectors)} vectors are fewer than {EXACT_BELOW}.", flush=True)
  return ScannIndex(vectors) if backend == "scann" else ExactIndex(vectors)


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

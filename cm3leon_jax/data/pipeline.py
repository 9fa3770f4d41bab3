"""Rows of tokens: documents are joined with their neighbors, transformed, packed, and batched over the mesh."""

# B rows of a batch, L slots of a row, T tokens of a sample.

from collections.abc import Iterator

import grain
import jax
import numpy as np

from cm3leon_jax.data import cm3
from cm3leon_jax.data.documents import Document, Segment
from cm3leon_jax.data.plan import RowPlan, SamplePlan
from cm3leon_jax.vocab import VocabLayout

FIELDS = {
  "inputs": np.int32,
  "targets": np.int32,
  "loss_weights": np.float32,
  "segment_ids": np.int32,
  "positions": np.int32,
}


def join(documents: list[Document], vocab: VocabLayout) -> np.ndarray:
  """Neighbors first, the document itself last (CM3Leon, section 2.1).

    </s> caption_1 <break> image_1 <break> caption <break> image </s>

  Returns:
    [T] int32.
  """
  parts: list = [[vocab.eos]]
  for segment in (s for d in documents for s in d.segments):
    parts += [segment.tokens, [vocab.brk]]
  return np.concatenate([*parts[:-1], [vocab.eos]]).astype(np.int32)


def build_sample(
  document: Document,
  neighbors: list[Document],
  plan: SamplePlan,
  vocab: VocabLayout,
  neighbor_weight: float,
):
  """Carries out a plan.

  Returns:
    tokens [T] int32, and the weight of each as a target [T] float32.

  Raises:
    ValueError: the sample's length is not the planned one: the store changed under the plan.
  """
  if plan.dropped:
    image = document.segments[-1].tokens
    tokens = np.concatenate([[vocab.eos, vocab.mask(0), vocab.brk], image, [vocab.eos]]).astype(
      np.int32
    )
    weights = np.ones(len(tokens), np.float32)
    weights[:3] = 0
    tokens, weights = tokens[: plan.length], weights[: plan.length]
  else:
    joined = join([*neighbors, document], vocab)
    before = sum(len(s.tokens) + 1 for d in neighbors for s in d.segments)
    joined_weights = np.ones(len(joined) + len(plan.spans) + 1, np.float32)
    joined_weights[1 : 1 + before] = neighbor_weight
    joined_weights[0] = 0
    layout = cm3.cm3_layout(len(joined), plan.spans)[: plan.length]
    tokens = cm3.apply_cm3_mask(joined, plan.spans, vocab)[: plan.length]
    weights = joined_weights[layout]
  if len(tokens) != plan.length:
    raise ValueError(
      f"document '{document.key}' gives a sample of {len(tokens)} tokens, planned were {plan.length}."
    )
  return tokens, weights


def pack_row(samples, length: int, pad: int) -> dict[str, np.ndarray]:
  """Lays samples one behind the other into one row; each predicts only its own tokens.

  Args:
    samples: (tokens [T], weights [T]) each; together at most `length` predictions.
    length: L.
    pad: id that fills what is left.

  Returns:
    inputs, targets, segment_ids (1, 2, ... and 0 for padding), positions: [L] int32; loss_weights: [L] float32.
  """
  row = {name: np.zeros(length, dtype) for name, dtype in FIELDS.items()}
  row["inputs"][:] = row["targets"][:] = pad
  at = 0
  for i, (tokens, weights) in enumerate(samples):
    part = slice(at, at + len(tokens) - 1)
    row["inputs"][part], row["targets"][part], row["loss_weights"][part] = (
      tokens[:-1],
      tokens[1:],
      weights[1:],
    )
    row["segment_ids"][part], row["positions"][part] = i + 1, np.arange(len(tokens) - 1)
    at = part.stop
  return row


def rows_of_samples(
  samples: list[np.ndarray], length: int, pad: int = VocabLayout.pad
) -> dict[str, np.ndarray]:
  """One sample a row, every target weighing 1. samples: [T] int32 each, T <= length + 1. Returns a batch of [B, L]."""
  rows = [pack_row([(s, np.ones(len(s), np.float32))], length, pad) for s in samples]
  return {name: np.stack([row[name] for row in rows]) for name in FIELDS}


class RowLoader:
  """Reads the documents that a plan names and makes the row; `loader[i]` is a dict of [L] arrays."""

  def __init__(self, plan: RowPlan, vocab: VocabLayout):
    self.plan, self.vocab = plan, vocab

  def __getitem__(self, i: int) -> dict[str, np.ndarray]:
    samples = [self._sample(*placement[:3]) for placement in self.plan.row(i)]
    return pack_row(samples, self.plan.config.sequence_length, self.vocab.pad)

  def _sample(self, source: int, pass_: int, unit: int):
    spec, units = self.plan.sources[source], self.plan.units[source]
    plan = self.plan.plan(source, pass_, unit)
    index, start = units.locate(unit)
    document = spec.store[index]
    lengths, is_image = units.lengths(spec.store, unit)
    if len(lengths) == 1 and not is_image[0]:
      piece = document.segments[0].tokens[start : start + int(lengths[0])]
      document = Document(**{**vars(document), "segments": (Segment(False, piece),)})
    candidates = spec.candidates(index)
    neighbors = [spec.bank[int(candidates[j])] for j in plan.neighbors]
    return build_sample(
      document, neighbors, plan, self.vocab, self.plan.config.neighbor_loss_weight
    )


def local_rows(sharding: jax.sharding.Sharding, shape: tuple[int, int]) -> list[int]:
  """Rows of a [B, L] batch that this process's devices hold; right also when a row is split over processes."""
  indices = sharding.addressable_devices_indices_map(shape)
  return sorted({r for rows, _ in indices.values() for r in range(*rows.indices(shape[0]))})


def batches(
  loader: RowLoader, first_row: int, batch_size: int, sharding: jax.sharding.Sharding
) -> Iterator[dict[str, jax.Array]]:
  """Endless global batches from row `first_row` on; batch j holds rows `first_row + j * batch_size + [0, batch_size)`.

  Each process reads only its own rows, prefetched by threads. What a batch holds depends on nothing but its rows:
  not on what was read before, nor on the number of processes.

  Yields:
    dict of [B, L] arrays laid out by `sharding`.
  """
  config = loader.plan.config
  shape = (batch_size, config.sequence_length)
  rows = local_rows(sharding, shape)

  def load(j: int) -> dict[str, np.ndarray]:
    read = [loader[first_row + j * batch_size + r] for r in rows]
    return {name: np.stack([row[name] for row in read]) for name in FIELDS}

  options = grain.ReadOptions(
    num_threads=config.read_threads, prefetch_buffer_size=2 * config.read_threads
  )
  dataset = grain.MapDataset.range(2**40).map(load).to_iter_dataset(options)
  place = {r: i for i, r in enumerate(rows)}
  for local in dataset:
    yield {
      name: jax.make_array_from_callback(
        shape,
        sharding,
        lambda index, x=x: x[[place[r] for r in range(*index[0].indices(batch_size))], index[1]],
      )
      for name, x in local.items()
    }

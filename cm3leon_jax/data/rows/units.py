"""The units of a pass over a source of training rows: documents, and pieces of long texts."""

import numpy as np

from cm3leon_jax.data.documents.store import DocumentStore
from cm3leon_jax.data.rows.sample_lengths import Segments, read_segments

SCAN = 2**22  # Number of segment lengths that are read at a time.


def long_texts(store: DocumentStore, most: int) -> tuple[np.ndarray, np.ndarray]:
  """Finds documents that consist of one text longer than `most` tokens.

  Returns the indices of these documents in ascending order, int64, and their lengths, int64.
  """
  offsets, lengths, is_image = map(np.asarray, (store.offsets, store.lengths, store.is_image))
  long = [np.zeros(0, np.int64)]
  for start in range(0, len(lengths), SCAN):
    block = slice(start, start + SCAN)
    long.append(start + np.flatnonzero((lengths[block] > most) & ~is_image[block]))
  segments = np.concatenate(long)
  documents = np.searchsorted(offsets, segments, side="right") - 1
  alone = offsets[documents + 1] - offsets[documents] == 1
  return documents[alone], lengths[segments[alone]].astype(np.int64)


class Units:
  """The units of a pass over a source: documents, and pieces of texts that do not fit into a row.

    sequence_length = 5, the documents are a text of 3 tokens and a text of 9 tokens
    units as (document, first token) = [(0, 0) (1, 0) (1, 4) (1, 8)]

  Memory grows only with the number of documents that are cut into pieces.
  """

  def __init__(self, store: DocumentStore, sequence_length: int):
    """Finds the documents of `store` that must be cut."""
    self._piece = sequence_length - 1  # A piece with </s> at both ends fills the row.
    self._cut, lengths = long_texts(store, self._piece)
    self._pieces = -(-lengths // self._piece)
    more = np.cumsum(self._pieces - 1)
    # Unit of the first piece of each cut document.
    self._first = self._cut + more - (self._pieces - 1)
    self._count = len(store) + (int(more[-1]) if len(more) else 0)

  def __len__(self) -> int:
    return self._count

  def locate(self, unit: int) -> tuple[int, int]:
    """Returns the document of a unit, and the index of its first token: 0 for a whole document."""
    at = int(self._first.searchsorted(unit, side="right")) - 1 if len(self._first) else -1
    if at < 0:
      return unit, 0
    piece, pieces = unit - int(self._first[at]), int(self._pieces[at])
    if piece < pieces:
      return int(self._cut[at]), piece * self._piece
    return int(self._cut[at]) + 1 + piece - pieces, 0

  def segments(self, store: DocumentStore, units: np.ndarray) -> tuple[np.ndarray, Segments]:
    """Returns the documents of many units, [n], and the segments of the units."""
    at = self._first.searchsorted(units, side="right") - 1
    cut = at >= 0
    documents, starts = units.copy(), np.zeros(len(units), np.int64)
    piece, pieces = units[cut] - self._first[at[cut]], self._pieces[at[cut]]
    documents[cut] = self._cut[at[cut]] + np.maximum(piece - pieces + 1, 0)
    starts[cut] = np.where(piece < pieces, piece * self._piece, 0)
    segments = read_segments(store.parts, documents)
    alone = np.flatnonzero(segments.counts == 1)
    first = segments.starts[alone]
    left = np.minimum(segments.lengths[first] - starts[alone], self._piece)
    segments.lengths[first] = np.where(segments.is_image[first], segments.lengths[first], left)
    return documents, segments

  def lengths(self, store: DocumentStore, unit: int) -> tuple[list[int], list[bool]]:
    """Returns the segment lengths of a unit, and whether each segment is an image."""
    document, start = self.locate(unit)
    lengths, is_image = (x.tolist() for x in store.segment_lengths(document))
    if len(lengths) == 1 and not is_image[0]:
      lengths = [min(lengths[0] - start, self._piece)]
    return lengths, is_image

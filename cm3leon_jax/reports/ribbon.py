"""Computes the coordinates of a drawing of a row: parts, documents, moved spans, loss weights."""

# L positions of a row.

from collections.abc import Iterable
import itertools

from cm3leon_jax.reports.row_contents import RowView, SampleView
from cm3leon_jax.reports.row_parts import NO_SPAN


def runs(values: Iterable[float]) -> list[tuple[int, int, float]]:
  """Returns the runs of equal values as (start, length, value).

  >>> runs([0, 1, 1, 0])
  [(0, 1, 0), (1, 2, 1), (3, 1, 0)]
  """
  result, position = [], 0
  for value, group in itertools.groupby(values):
    count = len(list(group))
    result.append((position, count, value))
    position += count
  return result


def ribbon(row: RowView) -> dict:
  """Returns the coordinates of a row's drawing, in positions of the row.

  A position shows its input token. The last token of a sample is only predicted, so it has no
  position.

  Returns:
    A dict with these entries:

    - length, used: number of positions of the row, and number of positions before the padding.
    - samples: (first position, number of positions, segment id, key) of each sample.
    - weights: (first position, number of positions, weight divided by the row's largest weight) of
      each run of equal weights other than 0.
    - parts: one dict per part, with x, width, kind, span, title.
    - owners: one dict per neighbor or document, with x, width, role.
    - moves: (position of the sentinel that replaces a span, middle of the moved span, span).
  """
  largest = max(1.0, float(row.loss_weights.max()))
  samples = [
    (v.sample.start, v.sample.num_positions, v.sample.segment_id, v.origin.document.key)
    for v in row.samples
  ]
  return {
    "length": len(row.loss_weights),
    "used": sum(v.sample.num_positions for v in row.samples),
    "samples": samples,
    "weights": [(x, n, w / largest) for x, n, w in runs(row.loss_weights.tolist()) if w],
    "parts": [part for view in row.samples for part in _parts(view)],
    "owners": [owner for view in row.samples for owner in _owners(view)],
    "moves": [move for view in row.samples for move in _moves(view)],
  }


def _parts(view: SampleView) -> list[dict]:
  sample, result = view.sample, []
  for part in view.parts:
    first = sample.start + part.start
    stop = sample.start + min(part.stop, sample.num_positions)
    if first < stop:
      owner = view.owner_name(part.segment) if part.kind != "special" else "special token"
      title = f"{owner}: {part.kind}, positions {first} to {stop - 1}{', infill' * part.moved}"
      result.append(
        {"x": first, "width": stop - first, "kind": part.kind, "span": part.span, "title": title}
      )
  return result


def _owners(view: SampleView) -> list[dict]:
  """Returns each document's range: all its parts and the `<break>` tokens between them."""
  bounds: dict[int, list[int]] = {}
  for part in view.parts:
    if not part.moved and (part.kind != "special" or part.span != NO_SPAN):
      low, high = bounds.get(view.owners[part.segment], (part.start, part.stop))
      bounds[view.owners[part.segment]] = [min(low, part.start), max(high, part.stop)]
  return [
    {
      "x": view.sample.start + low,
      "width": min(high, view.sample.num_positions) - low,
      "role": "neighbor" if owner < len(view.origin.neighbors) else "document",
    }
    for owner, (low, high) in bounds.items()
  ]


def _moves(view: SampleView) -> list[tuple[float, float, int]]:
  left = {p.span: p.start + 0.5 for p in view.parts if p.span != NO_SPAN and not p.moved}
  again = {p.span: (p.start + p.stop) / 2 for p in view.parts if p.moved and p.kind != "special"}
  return [(view.sample.start + left[span], view.sample.start + again[span], span) for span in again]

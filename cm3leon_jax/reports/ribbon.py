"""A row as a ribbon to scale: which slots are what, whose they are, where spans went, and what their predictions weigh."""

# L slots of a row.

import itertools

from cm3leon_jax.reports.inspect import RowView, SampleView
from cm3leon_jax.reports.row_parts import NO_SPAN


def runs(values) -> list[tuple[int, int, float]]:
  """Stretches of one value: (first, number, value).

  >>> runs([0, 1, 1, 0])
  [(0, 1, 0), (1, 2, 1), (3, 1, 0)]
  """
  found, position = [], 0
  for value, group in itertools.groupby(values):
    count = len(list(group))
    found.append((position, count, value))
    position += count
  return found


def ribbon(row: RowView) -> dict:
  """The row's tracks. Slots are drawn by the token that they read; the last token of a sample is only predicted.

  Returns:
    dict of
      length, used: slots of the row, and those before its padding.
      parts: one dict a part with x, width, kind, span, title.
      owners: one dict a neighbor, document or dropped condition with x, width, role.
      moves: (slot that a span left, slot where it stands again, span).
      samples: (first slot, slots, segment id, key).
      weights: (first slot, slots, weight as a share of the row's largest) where it is not 0.
  """
  length = len(row.loss_weights)
  largest = max(1.0, float(row.loss_weights.max()))
  found = {
    "length": length,
    "used": sum(v.sample.slots for v in row.samples),
    "parts": [],
    "owners": [],
    "moves": [],
  }
  found["samples"] = [
    (v.sample.start, v.sample.slots, v.sample.segment_id, v.origin.document.key)
    for v in row.samples
  ]
  found["weights"] = [(x, n, w / largest) for x, n, w in runs(row.loss_weights.tolist()) if w]
  for view in row.samples:
    found["parts"] += _parts(view)
    found["owners"] += _owners(view)
    found["moves"] += _moves(view)
  return found


def _parts(view: SampleView) -> list[dict]:
  sample, found = view.sample, []
  for part in view.parts:
    first, stop = sample.start + part.start, sample.start + min(part.stop, sample.slots)
    if first < stop:
      whose = view.whose(part.segment) if part.kind != "special" else "special token"
      title = f"{whose}: {part.kind}, slots {first} to {stop - 1}" + (
        ", infill" if part.moved else ""
      )
      found.append(
        {"x": first, "width": stop - first, "kind": part.kind, "span": part.span, "title": title}
      )
  return found


def _owners(view: SampleView) -> list[dict]:
  """One stretch a document, from its first part to its last, `<break>` within it included."""
  bounds: dict[int, list[int]] = {}
  for part in view.parts:
    if not part.moved and (part.kind != "special" or part.span != NO_SPAN):
      low, high = bounds.get(view.owners[part.segment], (part.start, part.stop))
      bounds[view.owners[part.segment]] = [min(low, part.start), max(high, part.stop)]
  role = lambda owner: "neighbor" if owner < len(view.origin.neighbors) else "document"
  return [
    {"x": view.sample.start + low, "width": min(high, view.sample.slots) - low, "role": role(owner)}
    for owner, (low, high) in bounds.items()
  ]


def _moves(view: SampleView) -> list[tuple[float, float, int]]:
  left = {p.span: p.start + 0.5 for p in view.parts if p.span != NO_SPAN and not p.moved}
  again = {p.span: (p.start + p.stop) / 2 for p in view.parts if p.moved and p.kind != "special"}
  return [(view.sample.start + left[span], view.sample.start + again[span], span) for span in again]

"""Counts records by origin: kind, source, license and attribution."""

import collections
from collections.abc import Iterable

FIELDS = ("kind", "source", "license", "attribution")
MOST = 100  # Maximum number of origins that are listed separately.


def most_common(origins: Iterable[dict]) -> list[dict]:
  """Sums the records of each origin. Merges origins after the first MOST by kind and license."""
  counts: collections.Counter[tuple] = collections.Counter()
  for origin in origins:
    counts[tuple(origin[field] for field in FIELDS)] += origin["records"]
  kept = counts.most_common(MOST)
  others: collections.Counter[tuple] = collections.Counter()
  for (kind, _, license_, _), records in counts.most_common()[MOST:]:
    others[kind, "others", license_, "others"] += records
  return [
    {**dict(zip(FIELDS, origin)), "records": records}
    for origin, records in [*kept, *others.most_common()]
  ]

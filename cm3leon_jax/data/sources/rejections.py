"""Counts the rejected records of a source. Raises an error if too many are rejected."""

import collections

from etils import epath

from cm3leon_jax.config import UserError
from cm3leon_jax.data.sources.records import KINDS, NOTES, SPLITS

CHECK_FROM = 10_000  # After this many records, the share is checked after every shard.


class Rejections:
  """Counts rejected records over shards. Raises UserError if their share is above `most`."""

  def __init__(self, most: float, path: epath.Path):
    self._most, self._path = most, path
    self._seen, self._first = 0, ""
    self._reasons: collections.Counter[str] = collections.Counter()

  def add(self, summary: dict) -> None:
    """Adds the counts of a shard. Calls `check` after at least CHECK_FROM records."""
    wrong = {reason: n for reason, n in summary["rejected"].items() if reason not in NOTES}
    self._reasons.update(wrong)
    counts = summary["counts"]
    self._seen += sum(counts.get(f"{split}_{kind}", 0) for split in SPLITS for kind in KINDS)
    self._seen += sum(wrong.values())
    self._first = self._first or summary["first"]
    if self._seen >= CHECK_FROM:
      self.check()

  def check(self) -> None:
    """Raises UserError if too many records are rejected."""
    rejected = self._reasons.total()
    if rejected > self._most * self._seen:
      counts = ", ".join(f"{reason} {count}" for reason, count in self._reasons.most_common())
      raise UserError(
        f"{rejected} of {self._seen} records are invalid ({counts}), more than "
        f"config.raw.max_rejected = {self._most:.1%}; {self._path} lists them: "
        "fix them, or raise max_rejected. "
        f"The first: {self._first}"
      )

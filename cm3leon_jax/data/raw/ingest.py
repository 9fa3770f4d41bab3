"""Converts a source into a raw folder of checked records and square images."""

import collections
from collections.abc import Callable
import dataclasses
import functools
from typing import Any
import warnings

from etils import epath
import numpy as np
from PIL import Image

from cm3leon_jax.config import own_functions
from cm3leon_jax.config.data import RawConfig
from cm3leon_jax.data.raw import summary as raw_statistics
from cm3leon_jax.data.raw.reader import INDEX, SCHEMA_VERSION, load_with_size, square
from cm3leon_jax.data.raw.writer import FILES, REJECTED, write_shard
from cm3leon_jax.data.sources import formats, function
from cm3leon_jax.data.sources.records import KINDS, SPLITS, origin_counts
from cm3leon_jax.errors import UserError
from cm3leon_jax.files.atomic import replacing
from cm3leon_jax.files.json_files import write_json
from cm3leon_jax.stages.shards import Runner, run_shards

SUMMARY_VERSION = 3  # Version of the summaries. Shards of other versions are written again.
# The share of rejected records is checked after every shard once this many records have been read.
CHECK_FROM = 10_000


class Rejections:
  """Counts the rejected records of all shards. Raises UserError if their share exceeds `most`."""

  def __init__(self, most: float, path: epath.Path):
    self._most, self._path = most, path
    self._seen, self._first = 0, ""
    self._reasons: collections.Counter[str] = collections.Counter()

  def add(self, summary: dict) -> None:
    """Adds the counts of a shard. Calls `check` after at least CHECK_FROM records."""
    wrong = summary["rejected"]
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
        f"fix them, or raise max_rejected. The first: {self._first}"
      )


def parts_of(config: RawConfig, workdir: str = "") -> list[formats.SourcePart]:
  """Splits the source into parts, one per shard.

  Raises:
    UserError: the config names no source, the source has no readable files, or its function cannot
      be called.
  """
  if not config.source:
    raise UserError(
      "config.raw.source is not set: give --config.raw.source=FOLDER, a folder of images with "
      "caption files (x.jpg, x.txt), tars, Parquet or JSONL, local or gs://; or "
      "FILE.py:FUNCTION, a function of yours that yields records."
    )
  if own_functions.is_function(config.source):
    return function.parts(config.source, config.options)
  return formats.parts(config.source, config.format, workdir)


def prepare(
  config: RawConfig,
  parts: list[formats.SourcePart],
  folder: epath.PathLike,
  runner: Runner,
) -> dict:
  """Writes a shard for each part of the source. Also writes index.json and rejected.jsonl.

  Each shard is a folder with pairs.jsonl, texts.jsonl, interleaved.jsonl, rejected.jsonl and
  images/. `parts` is as in `parts_of`.

  Returns the number of shards, the number of records by split and kind, the number of rejected
  records by reason, and the statistics of `summary.merged`.

  Raises:
    UserError: too many records are invalid (rejected.jsonl lists them), or no record is valid.
  """
  folder = epath.Path(folder)
  (folder / INDEX).unlink(missing_ok=True)
  named = {f"{i:06d}": part for i, part in enumerate(parts)}
  made = _write_shards(config, named, folder, runner)
  total: collections.Counter[str] = collections.Counter()
  more: collections.Counter[str] = collections.Counter()
  for m in made.values():
    total.update(m["counts"])
    more.update(m["more"])
  _check_some(config, total, more)
  shards = {name: {**m["counts"], "digest": m["digest"]} for name, m in made.items()}
  listed = origin_counts(origin for m in made.values() for origin in m["origins"])
  write_json(
    folder / INDEX, {"schema_version": SCHEMA_VERSION, "origins": listed, "shards": shards}
  )
  statistics = raw_statistics.merged(m["statistics"] for m in made.values())
  return {"shards": len(made), **total, **statistics, **more}


def _write_shards(
  config: RawConfig,
  parts: dict[str, formats.SourcePart],
  folder: epath.Path,
  runner: Runner,
) -> dict[str, dict]:
  """Writes shards and rejected.jsonl, even if too many records are rejected.

  `parts` maps shard names to parts of the source. Returns a dict from shard name to summary, in the
  order of `parts`.
  """
  made, rejections = {}, Rejections(config.max_rejected, folder / REJECTED)
  configs = {name: _identity(config, part) for name, part in parts.items()}
  try:
    for name, summary in run_shards(
      _Ingest(config, str(folder), parts),
      configs,
      folder / "done",
      runner,
      "raw shards",
      lambda name: all((folder / name / file).exists() for file in FILES),
    ):
      made[name] = summary
      rejections.add(summary)
    rejections.check()
  finally:
    with replacing(folder / REJECTED, "w") as file:
      for name in sorted(made):
        file.write((folder / name / REJECTED).read_text(encoding="utf-8"))
  return {name: made[name] for name in parts}


def _check_some(config: RawConfig, total: dict[str, int], more: dict[str, int]) -> None:
  """Raises UserError if the source has no valid record."""
  if any(total.get(f"{split}_{kind}") for split in SPLITS for kind in KINDS):
    return
  if more.get("other_licenses"):
    raise UserError(
      f"config.raw.licenses is {config.licenses}, but none of the {more['other_licenses']} "
      f"records of '{config.source}' has one of these licenses (config.raw.default_license is "
      "for records without a license)."
    )
  raise UserError(f"config.raw.source is '{config.source}', which has no usable record.")


def _identity(config: RawConfig, part: formats.SourcePart) -> dict:
  """Returns all values on which a shard depends, such as its part of the source."""
  others = ("max_rejected", "num_threads", "source", "options", "format")
  fields = {k: v for k, v in dataclasses.asdict(config).items() if k not in others}
  return {"raw": fields, "part": part.identity(), "summary_version": SUMMARY_VERSION}


@dataclasses.dataclass(frozen=True)
class _Ingest:
  """Writes the shards of a source. `parts` maps shard names to parts of the source."""

  config: RawConfig
  folder: str
  parts: dict[str, formats.SourcePart]

  def open(self) -> Callable[[str], dict]:
    warnings.filterwarnings("ignore", module="PIL")  # May be thousands for an image.
    own = function.Reader(self.config.source, self.config.options)
    return functools.partial(self._shard, own)

  def _shard(self, own: function.Reader, name: str) -> dict:
    part, folder = self.parts[name], epath.Path(self.folder) / name
    if part.kind == function.KIND:
      return write_shard(self.config, folder, own.read(part), self._load_drawing)
    load = functools.partial(load_with_size, crop=self.config.crop)
    return write_shard(self.config, folder, formats.read(part, self.config.allow_outside), load)

  def _load_drawing(self, image: Any, resolution: int) -> tuple[np.ndarray, tuple[int, int]]:
    """Draws an image of the user's function, and scales it. Returns its pixels and its size."""
    return square(Image.fromarray(function.draw(image)), resolution, self.config.crop)

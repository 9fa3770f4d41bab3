"""Converts a source into a raw folder of checked records and square images."""

import collections
from collections.abc import Callable, Iterable
import dataclasses
import functools
from typing import Any

from etils import epath
import numpy as np

from cm3leon_jax.config import UserError
from cm3leon_jax.data.raw import summary as raw_statistics
from cm3leon_jax.data.raw.config import RawConfig
from cm3leon_jax.data.raw.reader import INDEX, SCHEMA_VERSION, load_with_size
from cm3leon_jax.data.raw.writer import FILES, REJECTED, Load, write_shard
from cm3leon_jax.data.sources import formats, origins
from cm3leon_jax.data.sources.drawn import DrawnSource
from cm3leon_jax.data.sources.records import KINDS, SPLITS
from cm3leon_jax.data.sources.rejections import Rejections
from cm3leon_jax.files.atomic import replacing
from cm3leon_jax.files.json_files import write_json
from cm3leon_jax.files.shards import Runner, run_shards

SUMMARY_VERSION = 3  # Version of the summaries. Shards of other versions are written again.


def parts_of(config: RawConfig, drawn: DrawnSource | None = None) -> list[formats.SourcePart]:
  """Splits the source into parts, one per shard. `drawn` is a source that draws its images.

  Raises:
    UserError: the config names no source, the source has no readable files, `config.licenses` lacks
      the license of the drawings, or the source cannot draw at `config.resolution`.
  """
  if not config.source:
    raise UserError(
      "config.raw.source is not set: give --config.raw.source=FOLDER, a folder of images with "
      "caption files (x.jpg, x.txt), tars, Parquet or JSONL, local or gs://; or 'scenes'."
    )
  if drawn is not None:
    return drawn.parts(config.licenses, config.resolution)
  return formats.parts(config.source, config.format)


def prepare(
  config: RawConfig,
  parts: list[formats.SourcePart],
  folder: epath.PathLike,
  runner: Runner,
  drawn: DrawnSource | None = None,
) -> dict:
  """Writes a shard for each part of the source. Also writes index.json and rejected.jsonl.

  Each shard is a folder with pairs.jsonl, texts.jsonl, interleaved.jsonl, rejected.jsonl and
  images/. `parts` and `drawn` are as in `parts_of`.

  Returns the number of shards, the number of records by split and kind, the number of rejected
  records by reason, the statistics of `summary.merged`, and the numbers of `drawn`.

  Raises:
    UserError: too many records are invalid (rejected.jsonl lists them), or no record is valid.
  """
  folder = epath.Path(folder)
  (folder / INDEX).unlink(missing_ok=True)
  named = {f"{i:06d}": part for i, part in enumerate(parts)}
  made = _write_shards(config, named, folder, runner, drawn)
  total = _sum(m["counts"] for m in made.values())
  more = _sum(m["more"] for m in made.values())
  _check_some(config, total, more)
  shards = {name: {**m["counts"], "digest": m["digest"]} for name, m in made.items()}
  listed = origins.most_common(origin for m in made.values() for origin in m["origins"])
  write_json(
    folder / INDEX, {"schema_version": SCHEMA_VERSION, "origins": listed, "shards": shards}
  )
  if drawn is not None:
    more = {**drawn.numbers(), **dict(sorted(more.items()))}
  statistics = raw_statistics.merged(m["statistics"] for m in made.values())
  return {"shards": len(made), **total, **statistics, **more}


def _write_shards(
  config: RawConfig,
  parts: dict[str, formats.SourcePart],
  folder: epath.Path,
  runner: Runner,
  drawn: DrawnSource | None,
) -> dict[str, dict]:
  """Writes shards and rejected.jsonl, even if too many records are rejected.

  `parts` maps shard names to parts of the source. `drawn` is as in `parts_of`. Returns a
  dict from shard name to summary, in the order of `parts`.
  """
  made, rejections = {}, Rejections(config.max_rejected, folder / REJECTED)
  configs = {name: _identity(config, part, drawn) for name, part in parts.items()}
  try:
    for name, summary in run_shards(
      _Ingest(config, str(folder), parts, drawn),
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


def _identity(config: RawConfig, part: formats.SourcePart, drawn: DrawnSource | None) -> dict:
  """Returns all values on which a shard depends, such as its part of the source."""
  others = ("max_rejected", "num_threads", "source", "format", "train", "heldout", "bank")
  sections = {
    "raw": dataclasses.asdict(config),
    **({drawn.name: drawn.identity()} if drawn else {}),
  }
  kept = {
    name: {k: v for k, v in section.items() if k not in others}
    for name, section in sections.items()
  }
  return {**kept, "part": part.identity(), "summary_version": SUMMARY_VERSION}


def _sum(counts: Iterable[dict[str, int]]) -> dict[str, int]:
  total: dict[str, int] = {}
  for shard in counts:
    total |= {name: total.get(name, 0) + count for name, count in shard.items()}
  return total


@dataclasses.dataclass(frozen=True)
class _Ingest:
  """The job by which `prepare` writes shards. `parts` maps shard names to parts of the source."""

  config: RawConfig
  folder: str
  parts: dict[str, formats.SourcePart]
  drawn: DrawnSource | None

  def open(self) -> Callable[[str], dict]:
    return self._shard

  def _shard(self, name: str) -> dict:
    part, folder = self.parts[name], epath.Path(self.folder) / name
    if self.drawn is not None:
      pairs = list(self.drawn.read(part))
      numbers = dict(collections.Counter(map(self.drawn.number_of, pairs)))
      load = _with_own_size(self.drawn.load)
      return write_shard(self.config, folder, pairs, load, numbers, len(pairs))
    load = functools.partial(load_with_size, crop=self.config.crop)
    limits = self.config.allow_outside, self.config.max_caption_characters
    items = formats.read(part, *limits)
    return write_shard(self.config, folder, items, load)


def _with_own_size(draw: Callable[[Any, int], np.ndarray]) -> Load:
  """Adapts `draw` to the type `Load`: the result returns drawn pixels and their size."""

  def load(image: str | bytes, resolution: int) -> tuple[np.ndarray, tuple[int, int]]:
    pixels = draw(image, resolution)
    return pixels, (pixels.shape[1], pixels.shape[0])

  return load

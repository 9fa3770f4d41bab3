"""Checks raw pairs, texts and interleaved documents, and writes them in one format.

  cm3leon prepare_data --config=own.py --workdir=workdir/own
  cm3leon prepare_data --config=own.py --workdir=workdir/own --check_leaks

`--config.raw.source` is the folder of your images and texts, or FILE.py:FUNCTION, a function of
yours that yields records. docs/data_formats.md describes the formats.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Annotated

from etils import epath, epy
from pydantic import Field

from cm3leon_jax.commands import common, sharded, shared_flags
from cm3leon_jax.config import own_functions
from cm3leon_jax.config.settings import Settings
from cm3leon_jax.errors import UserError, printable
from cm3leon_jax.stages import from_data, stages

with epy.lazy_imports():
  from cm3leon_jax.data.checks import duplicates, leaks
  from cm3leon_jax.data.raw import counting, ingest, writer
  from cm3leon_jax.data.raw import summary as raw_statistics
  from cm3leon_jax.data.sources import formats
  from cm3leon_jax.stages import shards


@dataclasses.dataclass(frozen=True)
class Flags(shared_flags.Runner):
  check_leaks: bool = False
  """Prepare nothing; look for held-out images that are near duplicates of training images."""
  leak_psnr: Annotated[float, Field(ge=0)] | None = None
  """For --check_leaks: images are near duplicates if the PSNR of their 16 x 16 thumbnails is at
  least this many dB."""


def check_leaks(settings: Settings, workdir: epath.Path, psnr: float | None) -> None:
  """Prints the most similar held-out and training images. Raises UserError for near duplicates."""
  stages.require(workdir, "raw")
  psnr = duplicates.MIN_PSNR if psnr is None else psnr
  report = leaks.check(workdir / "raw", settings.raw.num_threads, psnr)
  print(
    f"check_leaks: heldout_images {report.heldout}, train_images {report.train}, "
    f"near_pairs {report.pairs}, leaked_heldout_images {report.leaked}; the nearest pairs:"
  )
  for pair in report.nearest:
    print(f"  {printable(str(pair))}")
  if report.leaked:
    raise UserError(
      f"{report.leaked} of {report.heldout} held-out images in {workdir / 'raw'} are near "
      "duplicates of training images: give both images the same `concept` in the source, or remove "
      "one of them."
    )


def check_enough(settings: Settings, summary: dict) -> None:
  """Raises UserError if the held-out pairs have fewer than two concepts.

  Otherwise the evaluation, long after, would raise it.
  """
  data = settings.data
  if settings.instructions.any:
    return
  pairs = summary.get("train_pairs", 0) - summary.get("train_crops", 0)
  heldout, concepts = summary.get("heldout_pairs", 0), summary.get("heldout_concepts", 0)
  if concepts < 2 and data.text_share + data.interleaved_share < 1:
    if pairs + heldout < 3:
      raise UserError(
        f"the source has {pairs + heldout} pairs, but a run needs at least 3 images with captions, "
        "of different concepts: add pairs."
      )
    of = ", all of the same concept" if heldout > 1 else ""
    raise UserError(
      f"the source has {pairs + heldout} pairs, {heldout} of them held out{of}, but the evaluation "
      "needs held-out pairs of at least 2 concepts: add pairs, or delete raw/ in the --workdir and "
      f"raise config.raw.heldout_fraction = {settings.raw.heldout_fraction}."
    )


def conclude(folder: epath.Path, summary: dict) -> None:
  """Prints the summary of the data, and warnings."""
  print("prepare_data:", ", ".join(f"{name} {value}" for name, value in summary.items()))
  if (folder / writer.REJECTED).stat().length:
    print(f"prepare_data: {folder / writer.REJECTED} lists what is left out.")
  for warning in raw_statistics.warnings(summary):
    print(f"prepare_data: warning: {warning}")


def _prepare(
  settings: Settings,
  parts: list[formats.SourcePart],
  folder: epath.Path,
  runner: shards.Runner,
  counts: bool,
) -> dict:
  """Writes the raw data. Returns the stage's summary, with counts for `from_data` if `counts`."""
  raw = settings.raw
  if not raw.resolution:
    raw = dataclasses.replace(raw, resolution=counting.resolution_of(parts, raw.allow_outside))
  if raw.crops < 0:
    raw = dataclasses.replace(raw, crops=counting.crops_of(parts, raw.allow_outside))
  summary = ingest.prepare(raw, parts, folder, runner)
  conclude(folder, summary)
  if counts:
    made = counting.counts_of(
      folder, summary, raw.resolution, settings.vocab.num_special, settings.text_tokenizer
    )
    summary[from_data.COUNTS] = dataclasses.asdict(made)
  return summary


def _print_computed(settings: Settings, workdir: epath.Path) -> None:
  """Prints the fields that were computed from the data, not those that follow a base."""
  of_parent = from_data.stored_of_parent(workdir)
  copied = {name.partition(".")[0] for name in of_parent if name.endswith(".batch_size")}
  names = [
    name
    for name in common.open_fields()
    if name not in of_parent and name.partition(".")[0] not in copied - {"train"}
  ]
  values = {name: operator.attrgetter(name)(settings) for name in names}
  print("prepare_data: computed from the data:", ", ".join(f"{k} {v}" for k, v in values.items()))


def main(settings: Settings, workdir: epath.Path, flags: Flags) -> None:
  if flags.check_leaks:
    if own_functions.is_function(settings.raw.source):
      raise UserError(
        "--check_leaks compares pixels, but drawn images of both splits may be similar: compare "
        f"the facts of the records of {settings.raw.source} instead."
      )
    check_leaks(settings, workdir, flags.leak_psnr)
    return
  raw = settings.raw
  if own_functions.is_function(raw.source) and (not raw.resolution or raw.crops < 0):
    raise UserError(
      f"config.raw.resolution is {raw.resolution} and config.raw.crops {raw.crops}, but they are "
      "computed only for images in files: give --config.raw.resolution=48 --config.raw.crops=0."
    )
  parts = ingest.parts_of(settings.raw, str(workdir))
  # If files are new or changed, the stage runs again, but only for the shards of these files.
  files, counts = formats.digest_of(parts), bool(common.open_fields())
  with sharded.stage(workdir, "raw", settings, {"files": files}) as summary:
    if summary is not None:
      summary.update(_prepare(settings, parts, workdir / "raw", flags.of_shards(), counts))
  if counts:  # Now `completed` can compute fields from the data.
    settings = common.completed(workdir)
    _print_computed(settings, workdir)
  summary = stages.require(workdir, "raw", summary=dict)["summary"]
  check_enough(settings, summary)


if __name__ == "__main__":
  common.run(main, Flags, prepares=True)

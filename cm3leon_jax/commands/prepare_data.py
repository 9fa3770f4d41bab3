"""Checks raw pairs, texts and interleaved documents, and writes them in one format.

  cm3leon prepare_data --config=scenes --workdir=workdir/scenes
  cm3leon prepare_data --config=scenes --workdir=workdir/scenes --check_leaks

`--config.raw.source` is the folder of your images and texts, or "scenes". Of the shipped configs,
only `scenes` and those that tune its model set it. docs/data_formats.md describes the formats.
"""

from __future__ import annotations

import dataclasses
import operator

from absl import flags
from etils import epath, epy

from cm3leon_jax import worlds
from cm3leon_jax.commands import common, sharded
from cm3leon_jax.config import UserError, printable
from cm3leon_jax.runs import from_data, stages
from cm3leon_jax.settings import Settings

with epy.lazy_imports():
  from cm3leon_jax.data.checks import duplicates, leaks
  from cm3leon_jax.data.raw import counting, ingest, writer
  from cm3leon_jax.data.raw import summary as raw_statistics
  from cm3leon_jax.data.sources import drawn as drawn_lib
  from cm3leon_jax.data.sources import formats
  from cm3leon_jax.evaluation import world as world_lib
  from cm3leon_jax.files import shards

_CHECK_LEAKS = flags.DEFINE_bool(
  "check_leaks",
  False,
  "Prepare nothing; look for held-out images that are near duplicates of training images or, for "
  "scenes, for held-out facts that training images show.",
)
_LEAK_PSNR = flags.DEFINE_float(
  "leak_psnr",
  None,
  "For --check_leaks: images are near duplicates if the PSNR of their 16 x 16 thumbnails is at "
  "least this many dB.",
  lower_bound=0.0,
)


def drawn_source(settings: Settings) -> drawn_lib.DrawnSource | None:
  """Returns the source of a world, which draws its images. None for any other source."""
  world = world_lib.of_source(settings)
  return None if world is None else world.source(settings)


def check_leaks(settings: Settings, workdir: epath.Path) -> None:
  """Prints the most similar held-out and training images. Raises UserError for near duplicates."""
  stages.require(workdir, "raw")
  psnr = duplicates.MIN_PSNR if _LEAK_PSNR.value is None else _LEAK_PSNR.value
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


def check_fact_leaks(drawn: drawn_lib.DrawnSource, workdir: epath.Path) -> None:
  """Raises UserError if the training scenes together show all facts of a held-out scene.

  Prints the numbers of held-out, training and leaked scenes.
  """
  stages.require(workdir, "raw")
  report = drawn.leaks(workdir / "raw")
  kinds = ", ".join(f"leaked_{kind} {number}" for kind, number in report.leaked.items())
  print(
    f"check_leaks, by facts: heldout_scenes {report.heldout}, train_scenes {report.train}, {kinds}"
  )
  for line in report.first:
    print(f"  {printable(line)}")
  if report.first:
    raise UserError(
      f"{sum(report.leaked.values())} of {report.heldout} held-out scenes in {workdir / 'raw'} "
      "show only facts that training scenes show, too: delete that folder and prepare it again."
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
    of = ", all of the same concept" if heldout > 1 else ""
    raise UserError(
      f"the source has {pairs + heldout} pairs, {heldout} of them held out{of}, but the evaluation "
      "needs held-out pairs of at least 2 concepts: add pairs, or delete raw/ in the --workdir and "
      f"raise config.raw.heldout_fraction = {settings.raw.heldout_fraction}."
    )


def conclude(settings: Settings, folder: epath.Path, summary: dict) -> None:
  """Searches for near duplicates, adds their counts to `summary`, and prints the data's summary."""
  near = None
  # Drawings are similar by design. Their concepts already keep similar drawings in one split.
  if settings.raw.source not in worlds.MODULES:
    near = leaks.near_duplicates(folder, settings.raw.num_threads)
    summary["compared_images"], summary["near_duplicates"] = near.compared, near.near
    summary["leaked_heldout_images"] = near.leaked
  print("prepare_data:", ", ".join(f"{name} {value}" for name, value in summary.items()))
  listed = (folder / writer.REJECTED).stat().length
  more = f" ({folder / writer.REJECTED} lists what is left out)" if listed else ""
  print(f"prepare_data: {raw_statistics.sentence(summary, settings.raw.resolution)}{more}.")
  if near and near.near:
    print(f"prepare_data: {printable(str(near))}.")
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
  summary = ingest.prepare(raw, parts, folder, runner, drawn_source(settings))
  conclude(dataclasses.replace(settings, raw=raw), folder, summary)
  if counts:
    made = counting.counts_of(
      folder, summary, raw.resolution, settings.vocab.num_special, settings.text_tokenizer
    )
    summary[from_data.COUNTS] = dataclasses.asdict(made)
  return summary


def _print_computed(settings: Settings, workdir: epath.Path) -> None:
  """Prints the fields that were computed from the data, not those that follow a base."""
  of_base = from_data.stored_of_base(workdir)
  copied = {name.partition(".")[0] for name in of_base if name.endswith(".batch_size")}
  names = [
    name
    for name in from_data.missing(flags.FLAGS.config)
    if name not in of_base and name.partition(".")[0] not in copied - {"train"}
  ]
  values = {name: operator.attrgetter(name)(settings) for name in names}
  print("prepare_data: computed from the data:", ", ".join(f"{k} {v}" for k, v in values.items()))


def main(settings: Settings, workdir: epath.Path, counts: bool = False) -> None:
  if _CHECK_LEAKS.value:
    if (drawn := drawn_source(settings)) is not None:
      check_fact_leaks(drawn, workdir)
    else:
      check_leaks(settings, workdir)
    return
  if not settings.raw.resolution and settings.raw.source in worlds.MODULES:
    raise UserError(
      f"config.raw.resolution is 0, but the source '{settings.raw.source}' needs a resolution: "
      "give --config.raw.resolution=48, or a folder of images as config.raw.source."
    )
  parts = ingest.parts_of(settings.raw, drawn_source(settings), str(workdir))
  # If files are new or changed, the stage runs again, but only for the shards of these files.
  files = formats.digest_of(parts)
  with sharded.stage(workdir, "raw", settings, {"files": files}) as (summary, runner):
    if summary is not None:
      summary.update(_prepare(settings, parts, workdir / "raw", runner, counts))
  if counts:  # Now `completed` can compute fields from the data.
    settings = common.completed(workdir)
    _print_computed(settings, workdir)
  summary = stages.require(workdir, "raw", summary=dict)["summary"]
  check_enough(settings, summary)


if __name__ == "__main__":
  common.run(
    lambda settings, workdir: main(settings, workdir, bool(from_data.missing(flags.FLAGS.config))),
    prepares=True,
  )

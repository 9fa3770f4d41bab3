"""Reads raw pairs, texts and interleaved documents, checks them and writes them in one format.

  python -m launch.prepare_data --config=ml_configs/scenes.py --workdir=workdir/scenes
  python -m launch.prepare_data --config=ml_configs/scenes.py --workdir=workdir/scenes --check_leaks

`--config.raw.source` is the folder of your images and texts, "openmoji" or "scenes";
docs/data_formats.md has the formats. Only the configs `scenes` and `openmoji` name a source.
"""

from absl import flags

from cm3leon_jax import stages
from cm3leon_jax.commands import common, sharded
from cm3leon_jax.config import UserError, printable

_CHECK_LEAKS = flags.DEFINE_bool(
  "check_leaks",
  False,
  "Only look for held-out images that are near duplicates of training images, or, for scenes, for "
  "held-out facts that training shows.",
)
_LEAK_PSNR = flags.DEFINE_float(
  "leak_psnr",
  None,
  "For --check_leaks: least PSNR in dB of the 16 x 16 thumbnails of near duplicates.",
  lower_bound=0.0,
)


def check_leaks(settings, workdir) -> None:
  """Prints the most similar held-out and training images.

  Raises:
    UserError: a held-out image is a near duplicate of a training image.
  """
  from cm3leon_jax.data import duplicates, leaks

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
      "duplicates of training images: give both the same `concept` in the source, or remove one."
    )


def check_fact_leaks(workdir) -> None:
  """Prints how many held-out scenes show only facts that training shows.

  Raises:
    UserError: there is one.
  """
  from cm3leon_jax.data import fact_leaks

  stages.require(workdir, "raw")
  report = fact_leaks.check(workdir / "raw")
  kinds = ", ".join(f"leaked_{kind} {number}" for kind, number in report.leaked.items())
  print(
    f"check_leaks, by facts: heldout_scenes {report.heldout}, train_scenes {report.train}, {kinds}"
  )
  for line in report.first:
    print(f"  {printable(line)}")
  if report.first:
    raise UserError(
      f"{sum(report.leaked.values())} of {report.heldout} held-out scenes in {workdir / 'raw'} "
      "show only facts that training shows: delete that folder and prepare it again."
    )


def main(settings, workdir):
  from cm3leon_jax.data import builtin_sources, ingest, sources

  if _CHECK_LEAKS.value:
    if settings.raw.source == builtin_sources.SCENES:
      check_fact_leaks(workdir)
    else:
      check_leaks(settings, workdir)
    return
  parts = ingest.parts_of(settings.raw, settings.scenes)
  # New or changed files make the stage run again, only for their shards.
  files = sources.digest_of(parts)
  with sharded.stage(workdir, "raw", settings, {"files": files}) as (summary, runner):
    if summary is not None:
      folder = workdir / "raw"
      summary.update(ingest.prepare(settings.raw, parts, folder, runner, settings.scenes))
      print("prepare_data:", ", ".join(f"{name} {value}" for name, value in summary.items()))


if __name__ == "__main__":
  common.run(main)

"""Writes raw pairs, texts and interleaved documents in one checked form.

  python -m launch.prepare_data --config=ml_configs/openmoji.py --workdir=workdir
  python -m launch.prepare_data --config=ml_configs/openmoji.py --workdir=workdir --check_leaks

`--config.raw.source` is "openmoji", or images and texts of one's own in any of several formats (docs/data_formats.md).
"""

import hashlib

from absl import flags

from cm3leon_jax import stages
from cm3leon_jax.commands import common, sharded
from cm3leon_jax.config import UserError

_CHECK_LEAKS = flags.DEFINE_bool(
  "check_leaks",
  False,
  "Look for held-out images that are near duplicates of training images, instead.",
)
_LEAK_PSNR = flags.DEFINE_float(
  "leak_psnr",
  None,
  "With --check_leaks: images whose 16 x 16 thumbnails differ by this PSNR or more are near, dB.",
  lower_bound=0.0,
)


def check_leaks(settings, workdir) -> None:
  """Prints the nearest held-out and training images. Raises UserError if any are duplicates."""
  from cm3leon_jax.data import duplicates, leaks

  stages.require(workdir, "raw")
  psnr = duplicates.MIN_PSNR if _LEAK_PSNR.value is None else _LEAK_PSNR.value
  report = leaks.check(workdir / "raw", settings.raw.num_threads, psnr)
  print(
    f"check_leaks: heldout_images {report.heldout}, train_images {report.train}, "
    f"near_pairs {report.pairs}, leaked_heldout_images {report.leaked}; the nearest pairs:"
  )
  for pair in report.nearest:
    print(f"  {pair}")
  if report.leaked:
    raise UserError(
      f"{report.leaked} of {report.heldout} held-out images in {workdir / 'raw'} are near "
      "duplicates of training images: give both the same `concept` in the source, or remove one."
    )


def main(settings, workdir):
  from cm3leon_jax.data import ingest

  if _CHECK_LEAKS.value:
    check_leaks(settings, workdir)
    return
  parts = ingest.parts_of(settings.raw)
  # Files that were added or have changed make the stage run again, over their shards alone.
  files = hashlib.sha256(repr(parts).encode()).hexdigest()
  with stages.stage(workdir, "raw", settings, {"files": files}) as summary:
    if summary is not None:
      summary.update(ingest.prepare(settings.raw, parts, workdir / "raw", sharded.runner()))
      print("prepare_data:", ", ".join(f"{name} {value}" for name, value in summary.items()))


if __name__ == "__main__":
  common.run(main)

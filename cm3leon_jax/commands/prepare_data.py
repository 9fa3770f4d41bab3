"""Writes raw pairs, texts and interleaved documents in one checked form.

  python -m launch.prepare_data --config=ml_configs/openmoji.py --workdir=workdir

`--config.raw.source` is "openmoji", or images and texts of one's own in any of several formats (docs/data_formats.md).
"""

import hashlib

from cm3leon_jax import stages
from cm3leon_jax.commands import common, sharded


def main(settings, workdir):
  from cm3leon_jax.data import ingest

  parts = ingest.parts_of(settings.raw)
  # Files that were added or have changed make the stage run again, over their shards alone.
  files = hashlib.sha256(repr(parts).encode()).hexdigest()
  with stages.stage(workdir, "raw", settings, {"files": files}) as summary:
    if summary is not None:
      summary.update(ingest.prepare(settings.raw, parts, workdir / "raw", sharded.runner()))
      print("prepare_data:", ", ".join(f"{name} {value}" for name, value in summary.items()))


if __name__ == "__main__":
  common.run(main)

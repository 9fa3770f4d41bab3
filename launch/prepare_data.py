"""Raw pairs and texts in one checked form: images, captions, where they come from, train or held out.

  python -m launch.prepare_data --config=ml_configs/openmoji.py --workdir=workdir

`--config.raw.source` is "openmoji", or images and texts of one's own in any of several formats (docs/data_formats.md).
"""

import dataclasses

from cm3leon_jax import stages
from cm3leon_jax.data import raw_pairs
from launch import common


def main(settings, workdir):
  config = dataclasses.asdict(settings.raw)
  del config["num_threads"]
  with stages.stage(workdir / "raw", {"raw": config}) as summary:
    if summary is not None:
      summary.update(raw_pairs.prepare(settings.raw, workdir / "raw"))
      print("prepare_data:", ", ".join(f"{name} {value}" for name, value in summary.items()))


if __name__ == "__main__":
  common.run(main)

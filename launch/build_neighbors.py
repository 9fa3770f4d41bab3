"""Chooses the neighbours of every pair of raw/, and keeps the embeddings that retrieval at inference needs.

python -m launch.build_neighbors --config=ml_configs/openmoji.py --workdir=workdir
"""

import dataclasses

from cm3leon_jax import stages
from cm3leon_jax.retrieval import neighbors
from launch import common


def main(settings, workdir):
  inputs = {"raw": stages.require(workdir / "raw", "prepare_data")["id"], **common.clip_inputs(settings, workdir)}
  config = {"retrieval": dataclasses.asdict(settings.retrieval), "seed": settings.seed, "inputs": inputs}
  with stages.stage(workdir / "neighbors", config) as summary:
    if summary is not None:
      clip = common.load_clip(settings, workdir)
      summary.update(neighbors.build_neighbors(settings.retrieval, clip, workdir / "raw", workdir / "neighbors", settings.seed))


if __name__ == "__main__":
  common.run(main)

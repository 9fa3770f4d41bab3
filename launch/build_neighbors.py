"""Chooses the neighbours of every pair of raw/, and keeps the embeddings that retrieval at inference needs.

python -m launch.build_neighbors --config=ml_configs/openmoji.py --workdir=workdir
"""

import dataclasses

from cm3leon_jax import stages
from cm3leon_jax.retrieval import neighbors
from cm3leon_jax.retrieval.clip import CLIP
from cm3leon_jax.tokenizers.text import TextTokenizer
from launch import common


def main(settings, workdir):
  inputs = {
    "raw": stages.require(workdir / "raw", "prepare_data")["id"],
    "text_tokenizer": stages.require(workdir / "text_tokenizer", "train_text_tokenizer")["id"],
    "clip": stages.require(workdir / "clip", "train_clip")["id"],
  }
  config = {"retrieval": dataclasses.asdict(settings.retrieval), "seed": settings.seed, "inputs": inputs}
  with stages.stage(workdir / "neighbors", config) as summary:
    if summary is not None:
      clip, encode = CLIP.load(workdir / "clip"), TextTokenizer(workdir / "text_tokenizer", settings.vocab).encode
      summary.update(
        neighbors.build_neighbors(settings.retrieval, clip, encode, workdir / "raw", workdir / "neighbors", settings.seed)
      )


if __name__ == "__main__":
  common.run(main)

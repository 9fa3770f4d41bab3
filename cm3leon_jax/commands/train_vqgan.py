"""Trains the image tokenizer, a VQGAN, on the training images.

  python -m launch.train_vqgan --config=ml_configs/openmoji.py --workdir=workdir

The same command continues a run that was stopped or killed.
"""

from cm3leon_jax import stages
from cm3leon_jax.commands import common


def main(settings, workdir):
  from cm3leon_jax.data import raw_pairs
  from cm3leon_jax.data.records import SPLITS
  from cm3leon_jax.tokenizers import train_vqgan

  with common.use_mesh(settings), stages.stage(workdir, "vqgan", settings) as summary:
    if summary is not None:
      images = [
        raw_pairs.open_images(workdir / "raw", split, settings.vqgan.resolution) for split in SPLITS
      ]
      summary.update(
        train_vqgan.train_vqgan(
          settings.vqgan, settings.vocab.image_size, settings.seed, *images, workdir / "vqgan"
        )
      )
      print("train_vqgan:", ", ".join(f"{k} {v:.4g}" for k, v in summary.items()))


if __name__ == "__main__":
  common.run(main)

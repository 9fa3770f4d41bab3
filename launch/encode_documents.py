"""Encodes raw pairs and texts as documents of token ids.

python -m launch.encode_documents --config=ml_configs/openmoji.py --workdir=workdir
"""

import dataclasses

from cm3leon_jax import stages
from cm3leon_jax.data.encode import encode_documents
from cm3leon_jax.tokenizers.text import TextTokenizer
from cm3leon_jax.tokenizers.vqgan import ImageTokenizer
from launch import common


def main(settings, workdir):
  stages_read = {"raw": "prepare_data", "text_tokenizer": "train_text_tokenizer", "vqgan": "train_vqgan"}
  config = {
    "vocab": dataclasses.asdict(settings.vocab),
    "max_caption_tokens": settings.text_tokenizer.max_caption_tokens,
    "inputs": {folder: stages.require(workdir / folder, command)["id"] for folder, command in stages_read.items()},
  }
  with stages.stage(workdir / "documents", config) as summary:
    if summary is not None:
      text_tokenizer = TextTokenizer(workdir / "text_tokenizer", settings.vocab)
      image_tokenizer = ImageTokenizer.load(workdir / "vqgan")
      summary.update(
        encode_documents(
          workdir / "raw",
          text_tokenizer,
          image_tokenizer,
          settings.vocab,
          settings.vqgan.resolution,
          settings.text_tokenizer.max_caption_tokens,
          workdir / "documents",
          num_threads=settings.raw.num_threads,
        )
      )
      for split, numbers in summary.items():
        print(f"encode_documents {split}:", ", ".join(f"{name} {value:.6g}" for name, value in numbers.items()))


if __name__ == "__main__":
  common.run(main)

"""Draws an image for a caption, without cm3leon_jax.

pip install jax flatbuffers tokenizers
python serve_example.py "a green bell left of a blue key" --seed=5
"""

import argparse

import artifacts
from artifacts import ABOUT, load, padded
import numpy as np

PROMPT, CODES = ABOUT["prompt"], ABOUT["image_tokens"]


def draw(weights: dict, captions: list, seeds: list, **own: float) -> tuple:
  """Returns uint8 images [b, H, W, 3] and their tokens [b, I]. A caption is a list of token ids."""
  prompts = padded([[*PROMPT["start"], *caption, *PROMPT["end"]] for caption in captions], CODES)
  others = padded([PROMPT["unconditional"]] * len(captions), CODES)
  arrays = artifacts.settings("generate_image", seeds, **own)
  result = load("generate_image")(weights, prompts=prompts, unconditional=others, **arrays)
  return np.asarray(result["images"]), np.asarray(result["tokens"])


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("caption", help="text; with --ids, token ids such as '100 101'")
  parser.add_argument("--seed", type=int, default=0, help="0 to 2^32 - 1; default 0")
  parser.add_argument("--ids", action="store_true", help="read ids, without tokenizers")
  flags = parser.parse_args()
  try:
    if flags.ids:
      ids = [int(i) for i in flags.caption.split()]
    else:
      ids = artifacts.load_tokenizer().encode(flags.caption, add_special_tokens=False).ids
    images, _ = draw(artifacts.load_weights(), [ids], [flags.seed])
  except (artifacts.Refused, ImportError, OSError, OverflowError, ValueError) as error:
    parser.error(str(error))
  artifacts.png("image.png", images[0])
  print("image.png")

"""Draws an image for a caption, without cm3leon_jax.

pip install jax flatbuffers tokenizers
python serve_example.py "a green bell left of a blue key" --seed=5
"""

from artifacts import ABOUT, VOCAB, load, load_weights, padded, png, reporting, request, settings
import numpy as np

EOS, BREAK, MASK, CODES = VOCAB["eos"], VOCAB["brk"], VOCAB["mask_0"], ABOUT["image_tokens"]


def draw(weights: dict, captions: list, seeds: list, **own: float) -> tuple:
  """Returns uint8 images [b, H, W, 3] and their tokens [b, I]. A caption is a list of token ids."""
  prompts = padded([[EOS, *caption, BREAK] for caption in captions], CODES)
  others = padded([[EOS, MASK, BREAK]] * len(captions), CODES)  # Unconditional prompts.
  arrays = settings("generate_image", seeds, **own)
  result = load("generate_image")(weights, prompts=prompts, unconditional=others, **arrays)
  return np.asarray(result["images"]), np.asarray(result["tokens"])


if __name__ == "__main__":
  with reporting():  # An invalid request prints one sentence and exits with code 2.
    caption, seed = request((__doc__ or "").partition("\n")[0])
    images, _ = draw(load_weights(), [caption], [seed])
    png("image.png", images[0])
    print("image.png")

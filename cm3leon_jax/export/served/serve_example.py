"""Draws an image for a caption, then describes the image token by token, without cm3leon_jax.

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


def describe(weights: dict, images: list, seeds: list, most: int = 32, **own: float) -> np.ndarray:
  """Returns the token ids [b, most + 1] of texts for images, which are given as lists of tokens."""
  prompts = padded([[EOS, MASK, BREAK, *image, EOS, MASK] for image in images], most + 1)
  plan = np.array([[[ABOUT["plan_kinds"]["TEXT"], most, 0], [0, 0, 0]]] * len(images), np.int32)
  ids = np.zeros((len(images), most + 1), np.int32)
  start, step = settings("prefill", seeds), settings("decode_step", seeds, **own)
  state = load("prefill")(weights, prompts=prompts, plan=plan, ids=ids, **start)
  while state["going"]:
    state = load("decode_step")(weights, state=state, **step)
  return np.asarray(state["ids"])


if __name__ == "__main__":
  with reporting():  # An invalid request prints one sentence and exits with code 2.
    caption, seed, text_of = request((__doc__ or "").partition("\n")[0])
    weights = load_weights()
    images, tokens = draw(weights, [caption], [seed])
    png("image.png", images[0])
    print("image.png:", text_of(describe(weights, tokens.tolist(), [seed], text_top_k=1)[0]))

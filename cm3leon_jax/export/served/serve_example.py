"""Draws an image for a caption, then describes the image, token by token: by jax alone.

pip install jax flatbuffers tokenizers
python serve_example.py "a green bell left of a blue key" 5  # The number is a seed.
"""

import sys

from artifacts import ABOUT, VOCAB, load, load_tokenizer, load_weights, padded, png, settings
import numpy as np

EOS, BREAK, MASK, CODES = VOCAB["eos"], VOCAB["brk"], VOCAB["mask_0"], ABOUT["image_tokens"]


def draw(weights, captions, seeds, **given):
  """Returns images, uint8 [b, H, W, 3], and their tokens, [b, I], for the ids of captions."""
  result = load("generate_image")(
    weights,
    prompts=padded([[EOS, *caption, BREAK] for caption in captions], CODES),
    unconditional=padded([[EOS, MASK, BREAK]] * len(captions), CODES),
    seeds=np.array(seeds, np.uint32),
    **settings("generate_image", len(captions), **given),
  )
  return np.asarray(result["images"]), np.asarray(result["tokens"])


def describe(weights, images, seeds, most=32, **given):
  """Returns the ids of texts of at most `most` tokens, [b, most + 1], for the tokens of images."""
  plan = [[ABOUT["plan_kinds"]["TEXT"], most, 0], [0, 0, 0]]
  state = load("prefill")(
    weights,
    prompts=padded([[EOS, MASK, BREAK, *image, EOS, MASK] for image in images], most + 1),
    plan=np.array([plan] * len(images), np.int32),
    seeds=np.array(seeds, np.uint32),
    ids=np.zeros((len(images), most + 1), np.int32),
  )
  while state["going"]:
    sampling = settings("decode_step", len(images), **given)
    state = load("decode_step")(weights, state=state, **sampling)
  return np.asarray(state["ids"])


if __name__ == "__main__":
  caption, seed = (*sys.argv[1:], 0)[:2]
  tokenizer, weights, seeds = load_tokenizer(), load_weights(), [int(seed)]
  ids = tokenizer.encode(caption, add_special_tokens=False).ids
  images, tokens = draw(weights, [ids], seeds)
  png("image.png", images[0])
  print("image.png:", tokenizer.decode(describe(weights, tokens, seeds, text_top_k=1)[0]))

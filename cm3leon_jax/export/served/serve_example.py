"""Draws an image for a caption by jax alone, then describes the image, token by token.

pip install jax flatbuffers  # And tokenizers, for captions that are no ids.
python serve_example.py "a green bell left of a blue key"
python serve_example.py "301 77 412" 5  # Ids of the caption's tokens, and a seed.
"""

import sys

from artifacts import ABOUT, HERE, VOCAB, load, load_weights, padded, png, settings
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
  """Returns the ids of a text of at most `most` tokens for the tokens of each image."""
  count, step = len(images), load("decode_step")
  state = load("prefill")(
    weights,
    prompts=padded([[EOS, MASK, BREAK, *image, EOS, MASK] for image in images], most + 1),
    plan=np.tile(np.int32([[ABOUT["plan_kinds"]["TEXT"], most, 0], [0, 0, 0]]), (count, 1, 1)),
    seeds=np.array(seeds, np.uint32),
    ids=np.zeros((count, most + 1), np.int32),
  )
  while state["going"]:
    state = step(weights, state=state, **settings("decode_step", count, **given))
  return [[int(i) for i in row if i not in (VOCAB["pad"], VOCAB["eoss"])] for row in state["ids"]]


def main(caption, seed=0):
  ids, tokenizer = caption.split(), None
  if not caption.replace(" ", "").isdigit():
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(HERE / "tokenizer.json"))
    tokenizer.encode_special_tokens = True  # "</s>" in a caption is text.
    ids = tokenizer.encode(caption, add_special_tokens=False).ids
  weights = load_weights()
  images, tokens = draw(weights, [[int(i) for i in ids]], [int(seed)])
  png("image.png", images[0])
  (described,) = describe(weights, tokens, [int(seed)], text_top_k=1)  # Greedy.
  print("image.png:", tokenizer.decode(described) if tokenizer else described)


if __name__ == "__main__":
  main(*sys.argv[1:])

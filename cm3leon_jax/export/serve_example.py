"""Runs this folder by `jax` alone: draws an image for a caption, then describes the image.

  pip install jax flatbuffers  # And tokenizers, for captions that are no ids.
  python serve_example.py "a green bell left of a blue key"
  python serve_example.py "301 77 412" --seed=1  # Ids of the caption's tokens; see manifest.json.
"""

import argparse
import hashlib
import json
import pathlib
import struct
import sys
import zlib

import jax
from jax import export
import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
ABOUT = json.loads((HERE / "manifest.json").read_text())
VOCAB = ABOUT["vocab"]


def read(name):
  data = (HERE / name).read_bytes()
  if hashlib.sha256(data).hexdigest() != ABOUT["digests"][name]:
    sys.exit(f"{name} is not the file that was exported: copy the folder again.")
  return data


def load(name):
  """Returns an artifact as a function of the weights and of named arrays."""
  version, made_by = ABOUT["calling_convention"], ABOUT["jax"]
  oldest = export.minimum_supported_calling_convention_version
  newest = export.maximum_supported_calling_convention_version
  if not oldest <= version <= newest:
    sys.exit(
      f"{name} has calling convention {version}; jax {jax.__version__} runs {oldest} to {newest}: "
      f"install jax {made_by}, or export again."
    )
  return jax.jit(export.deserialize(bytearray(read(f"{name}.stablehlo"))).call)


def load_weights():
  weights = {}
  for name in ABOUT["digests"]:
    if name.endswith(".safetensors"):  # Size of the header, header (JSON), arrays.
      data = read(name)
      start = 8 + int.from_bytes(data[:8], "little")
      for key, place in json.loads(data[8:start]).items():
        if key in ABOUT["weights"]:
          begin, end = (start + n for n in place["data_offsets"])
          array = np.frombuffer(data[begin:end], jax.numpy.dtype(ABOUT["weights"][key]["dtype"]))
          weights[key] = jax.device_put(array.reshape(place["shape"]))
  return weights


def padded(prompts):
  """Pads prompts on the left to a multiple of 32, so that few programs are compiled."""
  slots = -(-max(map(len, prompts)) // 32) * 32
  return np.array([[VOCAB["pad"]] * (slots - len(p)) + list(p) for p in prompts], np.int32)


def settings(artifact, count, **given):
  """Returns the settings of sampling, one value for each of `count` samples."""
  values, arrays = ABOUT["sampling"] | given, ABOUT["artifacts"][artifact]["arguments"]
  return {k: np.full(count, v, arrays[k]["dtype"]) for k, v in values.items() if k in arrays}


def draw(generate_image, weights, captions, seeds, **given):
  """Returns images, uint8 [b, H, W, 3], and their tokens, for the ids of captions."""
  prompts = [[VOCAB["eos"], *caption, VOCAB["brk"]] for caption in captions]
  without = [[VOCAB["eos"], VOCAB["mask_0"], VOCAB["brk"]]] * len(captions)
  arguments = {"prompts": padded(prompts), "unconditional": padded(without)}
  arguments |= settings("generate_image", len(captions), **given)
  result = generate_image(weights, seeds=np.array(seeds, np.uint32), **arguments)
  return np.asarray(result["images"]), np.asarray(result["tokens"])


def describe(prefill, decode_step, weights, image, seed, most=32, **given):
  """Returns ids of a caption of at most `most` tokens, step by step, for the tokens of an image."""
  prompt = [VOCAB["eos"], VOCAB["mask_0"], VOCAB["brk"], *image, VOCAB["eos"], VOCAB["mask_0"]]
  plan = np.array([[[ABOUT["plan_kinds"]["TEXT"], most, 0], [0, 0, 0]]], np.int32)
  room, seeds = np.zeros((1, most + 1), np.int32), np.array([seed], np.uint32)
  state = prefill(weights, prompts=padded([prompt]), plan=plan, seeds=seeds, ids=room)
  while state["going"]:
    state = decode_step(weights, state=state, **settings("decode_step", 1, **given))
  return [int(i) for i in state["ids"][0] if i not in (VOCAB["pad"], VOCAB["eoss"])]


def png(image):
  def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

  rows = b"".join(b"\0" + row.tobytes() for row in image)
  size = struct.pack(">2I5B", image.shape[1], image.shape[0], 8, 2, 0, 0, 0)
  chunks = chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
  return b"\x89PNG\r\n\x1a\n" + chunks


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("caption")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--output", default="image.png")
  flags = parser.parse_args()
  tokenizer = None
  if all(word.isdigit() for word in flags.caption.split()):
    caption = [int(word) for word in flags.caption.split()]
  else:
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(HERE / "tokenizer.json"))
    tokenizer.encode_special_tokens = True  # "</s>" in a caption is text.
    caption = tokenizer.encode(flags.caption, add_special_tokens=False).ids
  weights = load_weights()
  images, tokens = draw(load("generate_image"), weights, [caption], [flags.seed])
  pathlib.Path(flags.output).write_bytes(png(images[0]))
  ids = describe(load("prefill"), load("decode_step"), weights, tokens[0], flags.seed)
  print(f"{flags.output}, described as:", tokenizer.decode(ids) if tokenizer else ids)


if __name__ == "__main__":
  main()

"""Checks and loads artifacts, weights and text tokenizer of this folder, by jax and flatbuffers.

Only `load_tokenizer` needs the package tokenizers, too.
"""

import functools
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
  """Reads a file; exits if it is not the one that was exported."""
  data = (HERE / name).read_bytes()
  if hashlib.sha256(data).hexdigest() != ABOUT["digests"][name]:
    sys.exit(f"{name} is not the file that was exported: copy the folder again.")
  return data


@functools.cache
def load(name):
  """Returns an artifact as a compiled function of the weights and of the arrays in the manifest."""
  oldest = export.minimum_supported_calling_convention_version
  newest = export.maximum_supported_calling_convention_version
  version = ABOUT["artifacts"][name]["calling_convention"]
  if not oldest <= version <= newest:
    sys.exit(
      f"{name} has calling convention {version}, and jax {jax.__version__} runs {oldest} to "
      f"{newest}: install jax {ABOUT['jax']}, or export again."
    )
  return jax.jit(export.deserialize(bytearray(read(f"{name}.stablehlo"))).call)


def load_weights():
  """Returns the weights by name, on the default device."""
  weights = {}
  for file in ABOUT["digests"]:
    if file.endswith(".safetensors"):  # Size of the header, the header as JSON, the arrays.
      data = read(file)
      start = 8 + int.from_bytes(data[:8], "little")
      for name, place in json.loads(data[8:start]).items():
        if name in ABOUT["weights"]:
          dtype = jax.numpy.dtype(ABOUT["weights"][name]["dtype"])
          begin, end = (start + n for n in place["data_offsets"])
          array = np.frombuffer(memoryview(data)[begin:end], dtype).reshape(place["shape"])
          weights[name] = jax.device_put(array)
  return weights


def load_tokenizer():
  """Returns the text tokenizer; `decode` leaves out special tokens, which end and pad a text."""
  from tokenizers import Tokenizer

  tokenizer = Tokenizer.from_str(read("tokenizer.json").decode())
  tokenizer.encode_special_tokens = True  # "</s>" in a caption is text.
  return tokenizer


def padded(prompts, following):
  """Pads prompts on the left to a multiple of 32, so that few programs are compiled.

  Raises ValueError if one is too long for the number of tokens that will follow.
  """
  longest = max(map(len, prompts))
  if longest + following > ABOUT["positions"]:
    raise ValueError(
      f"a prompt has {longest} tokens; with the {following} that follow it may have at most "
      f"{ABOUT['positions']}, the longest sample of training."
    )
  slots = -(-longest // 32) * 32
  return np.array([[VOCAB["pad"]] * (slots - len(p)) + list(p) for p in prompts], np.int32)


def settings(artifact, count, **given):
  """Returns the artifact's settings of sampling for `count` samples: given, or the model's own."""
  values, arrays = ABOUT["sampling"] | given, ABOUT["artifacts"][artifact]["arguments"]
  return {k: np.full(count, v, arrays[k]["dtype"]) for k, v in values.items() if k in arrays}


def png(file, image):
  """Writes an image, uint8 [H, W, 3]."""

  def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

  height, width, _ = image.shape
  rows = b"".join(b"\0" + row.tobytes() for row in image)
  content = chunk(b"IHDR", struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0))
  content += chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
  pathlib.Path(file).write_bytes(b"\x89PNG\r\n\x1a\n" + content)

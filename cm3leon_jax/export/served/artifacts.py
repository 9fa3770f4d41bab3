"""Checks and loads the artifacts, weights and text tokenizer in this folder.

Needs jax and flatbuffers, and tokenizers for text. Functions raise `Refused` for damaged files and
invalid arguments.
"""

from collections.abc import Callable, Sequence
import functools
import hashlib
import json
import pathlib
import struct
from typing import TYPE_CHECKING, Any
import zlib

import jax
from jax import export
import numpy as np

if TYPE_CHECKING:
  from tokenizers import Tokenizer

HERE = pathlib.Path(__file__).resolve().parent
ABOUT: dict[str, Any] = json.loads((HERE / "manifest.json").read_bytes())
VOCAB = ABOUT["vocab"]


class Refused(Exception):
  """Error for an invalid file or argument. The message says in one sentence what is valid."""


def read(name: str) -> bytes:
  """Reads a file; raises Refused if the file has changed since the export."""
  data = (HERE / name).read_bytes()
  if hashlib.sha256(data).hexdigest() != ABOUT["digests"][name]:
    raise Refused(f"{HERE / name} is not the file that was exported: copy the folder again.")
  return data


@functools.cache
def load(name: str) -> Callable[..., Any]:
  """Returns an artifact as a compiled function of the weights and the arguments in the manifest.

  Raises Refused if the file has changed, or if the installed jax does not support its version.
  """
  data = read(f"{name}.stablehlo")
  try:
    artifact = export.deserialize(bytearray(data))
    artifact.mlir_module()  # Parses the program, whose format has its own version.
  except Exception as error:  # The digest matches, so the version is not supported.
    raise Refused(
      f"jax {jax.__version__} cannot read {name} ({' '.join(str(error).split())}): install jax "
      f"{ABOUT['jax']}, or export again."
    ) from error
  return jax.jit(artifact.call)


def load_weights() -> dict[str, jax.Array]:
  """Maps the names of the weights to arrays on the default device."""
  weights = {}
  for file in (name for name in ABOUT["digests"] if name.endswith(".safetensors")):
    data = read(file)  # Consists of the header size, the JSON header and the arrays.
    start = 8 + int.from_bytes(data[:8], "little")
    places = json.loads(data[8:start])
    for name in places.keys() & ABOUT["weights"].keys():
      dtype = jax.numpy.dtype(ABOUT["weights"][name]["dtype"])
      begin, end = (start + n for n in places[name]["data_offsets"])
      array = np.frombuffer(memoryview(data)[begin:end], dtype).reshape(places[name]["shape"])
      weights[name] = jax.device_put(array)
  return weights


def load_tokenizer() -> "Tokenizer":
  """Returns the text tokenizer."""
  from tokenizers import Tokenizer

  tokenizer = Tokenizer.from_str(read("tokenizer.json").decode())
  tokenizer.encode_special_tokens = True  # "</s>" in a caption is ordinary text.
  return tokenizer


def padded(prompts: Sequence[Sequence[int]], following: int) -> np.ndarray:
  """Pads prompts on the left to a multiple of 32 tokens, so that fewer programs are compiled.

  Raises Refused if an id is outside the vocabulary, or if a prompt and the following tokens are
  longer than the longest sample in training.
  """
  ids = VOCAB["text_size"] + VOCAB["image_size"]
  for wrong in (i for prompt in prompts for i in prompt if not VOCAB["pad"] < i < ids):
    raise Refused(f"a prompt has the id {wrong}; token ids must be from 1 to {ids - 1}.")
  longest = max(map(len, prompts))
  if longest + following > ABOUT["positions"]:
    raise Refused(
      f"a prompt has {longest} tokens, and {following} tokens follow; together they must be at "
      f"most {ABOUT['positions']}, the longest sample in training."
    )
  width = -(-longest // 32) * 32
  return np.array([[VOCAB["pad"]] * (width - len(p)) + list(p) for p in prompts], np.int32)


def settings(artifact: str, seeds: Sequence[int], **given: Any) -> dict[str, np.ndarray]:
  """Returns the seeds and sampling settings of an artifact, each with one value per sample.

  Settings that are not in `given` get the model's defaults.
  """
  arrays = ABOUT["artifacts"][artifact]["arguments"]
  values = {**ABOUT["sampling"], **given, "seeds": seeds}
  return {name: np.full(len(seeds), x, arrays[name]["dtype"]) for name, x in values.items()}


def png(file: str, image: np.ndarray) -> None:
  """Writes an image, uint8 [H, W, 3], as a PNG file."""

  def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

  height, width, _ = image.shape
  rows = b"".join(b"\0" + row.tobytes() for row in image)
  content = chunk(b"IHDR", struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0))
  content += chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
  pathlib.Path(file).write_bytes(b"\x89PNG\r\n\x1a\n" + content)

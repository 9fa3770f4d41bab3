"""Checks and loads the artifacts, weights and text tokenizer in this folder.

This module needs jax and flatbuffers, and tokenizers for text. Functions raise `Refused` for
invalid files and arguments.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
import contextlib
import functools
import hashlib
import importlib
import json
import pathlib
import struct
import sys
from typing import TYPE_CHECKING, Any
import zlib

if TYPE_CHECKING:
  from tokenizers import Tokenizer

HERE = pathlib.Path(__file__).resolve().parent
SEEDS = 2**32


class Refused(Exception):
  """Error for an invalid file or argument. The message says in one sentence what is valid."""


@contextlib.contextmanager
def reporting() -> Iterator[None]:
  """If the body raises Refused, prints its sentence and ends the process with exit code 2."""
  try:
    yield
  except (Refused, OSError) as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


def _bytes(name: str) -> bytes:
  if not (HERE / name).is_file():
    raise Refused(f"{HERE} has no {name}: copy the whole folder of the export again.")
  return (HERE / name).read_bytes()


def _manifest() -> dict[str, Any]:
  try:
    return json.loads(_bytes("manifest.json"))
  except ValueError as error:
    raise Refused(f"{HERE / 'manifest.json'} is damaged ({error}): copy it again.") from error


with reporting():
  ABOUT = _manifest()
  try:
    import jax
    from jax import export
    import numpy as np

    importlib.import_module("flatbuffers")  # jax.export requires it to read artifacts.
  except ImportError as _error:
    raise Refused(f"{_error}: `pip install jax flatbuffers tokenizers`.") from _error
VOCAB = ABOUT["vocab"]


def read(name: str) -> bytes:
  """Reads a file; raises Refused if the file has changed since the export."""
  data = _bytes(name)
  if hashlib.sha256(data).hexdigest() != ABOUT["digests"][name]:
    raise Refused(f"{HERE / name} is not the file that was exported: copy the folder again.")
  return data


@functools.cache
def load(name: str) -> Callable[..., Any]:
  """Returns an artifact as a compiled function of the weights and the arguments in the manifest.

  Raises Refused if the file has changed, or if the installed jax does not support its version.
  """
  data = read(f"{name}.stablehlo")
  oldest = export.minimum_supported_calling_convention_version
  newest = export.maximum_supported_calling_convention_version
  version = ABOUT["artifacts"][name]["calling_convention"]
  other = f"install jax {ABOUT['jax']}, or export again."
  if not oldest <= version <= newest:
    raise Refused(
      f"{name} has calling convention {version}, but jax {jax.__version__} runs {oldest} to "
      f"{newest}: {other}"
    )
  try:
    artifact = export.deserialize(bytearray(data))
    artifact.mlir_module()  # Parses the program, whose format has its own version.
  except Exception as error:  # The digest matches, so the version is not supported.
    reason = " ".join(str(error).split())
    raise Refused(f"jax {jax.__version__} cannot read {name} ({reason}): {other}") from error
  return jax.jit(artifact.call)


def load_weights() -> dict[str, jax.Array]:
  """Maps the names of the weights to arrays on the default device."""
  weights = {}
  for file in ABOUT["digests"]:
    if file.endswith(".safetensors"):  # The file: header size, JSON header, arrays.
      data = read(file)
      start = 8 + int.from_bytes(data[:8], "little")
      for name, place in json.loads(data[8:start]).items():
        if name in ABOUT["weights"]:
          dtype = jax.numpy.dtype(ABOUT["weights"][name]["dtype"])
          begin, end = (start + n for n in place["data_offsets"])
          array = np.frombuffer(memoryview(data)[begin:end], dtype).reshape(place["shape"])
          weights[name] = jax.device_put(array)
  return weights


def load_tokenizer() -> "Tokenizer":
  """Returns the text tokenizer.

  Raises Refused if the package tokenizers is not installed.
  """
  try:
    from tokenizers import Tokenizer
  except ImportError as error:
    raise Refused("text needs tokenizers: `pip install tokenizers`, or use --ids.") from error
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


def settings(
  artifact: str, seeds: Sequence[int], **given: float | np.ndarray
) -> dict[str, np.ndarray]:
  """Returns the seeds and sampling settings of an artifact, each with one value per sample.

  Settings that are not in `given` get the model's defaults. Raises Refused for an unknown name.
  """
  arrays = ABOUT["artifacts"][artifact]["arguments"]
  values = {name: x for name, x in ABOUT["sampling"].items() if name in arrays}
  for name in set(given) - set(values):
    raise Refused(f"{artifact} has no setting {name!r}; its settings are {', '.join(values)}.")
  values = {k: np.full(len(seeds), x, arrays[k]["dtype"]) for k, x in (values | given).items()}
  return values | ({"seeds": np.array(seeds, np.uint32)} if "seeds" in arrays else {})


def request(description: str) -> tuple[list[int], int]:
  """Returns the caption's token ids and the seed of the command line.

  Prints one sentence and exits with code 2 if the command line is invalid.
  """
  parser = argparse.ArgumentParser(description=description)
  parser.add_argument("caption", help="text; with --ids, token ids such as '100 101'")
  parser.add_argument("--seed", type=int, default=0, help="0 to 2^32 - 1; default 0")
  parser.add_argument("--ids", action="store_true", help="read ids, without tokenizers")
  flags = parser.parse_args()
  if not 0 <= flags.seed < SEEDS:
    parser.error(f"--seed is {flags.seed}; it must be 0 to {SEEDS - 1}.")
  if not flags.ids:
    return load_tokenizer().encode(flags.caption, add_special_tokens=False).ids, flags.seed
  try:
    return [int(i) for i in flags.caption.split()], flags.seed
  except ValueError:
    parser.error(f"with --ids the caption must be ids such as '100 101', not {flags.caption!r}.")


def png(file: str, image: np.ndarray) -> None:
  """Writes an image, uint8 [H, W, 3], as a PNG file."""

  def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

  height, width, _ = image.shape
  rows = b"".join(b"\0" + row.tobytes() for row in image)
  content = chunk(b"IHDR", struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0))
  content += chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
  pathlib.Path(file).write_bytes(b"\x89PNG\r\n\x1a\n" + content)

"""Decodes image codes to images with numpy and Pillow: neither JAX nor cm3leon_jax is needed.

  python decode_image.py codes.json image.png
  python decode_image.py --ids generated.json image.png

codes.json has the codes of one image, a list of integers row by row, or a list of such lists. With
--ids it has token ids of the language model instead, prompts and texts among them: every run of ids
of image codes is an image. Of several images the files are image_0.png, image_1.png, ...

As a module: `decode(codes)` returns uint8 [B, H, W, 3], `codes_of(ids)` finds the codes in ids, and
`encode(images)` returns the codes of images, for prompts that have an image in them. The files
config.json and params.safetensors are read from the folder of this script.
"""

# B images, H height, W width, C channels, E code width, K codes, T codes of an image, L levels of a
# channel of FSQ.

import argparse
import functools
import json
import pathlib
import struct
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Folder = str | pathlib.PurePath
FORMAT = "cm3leon_jax.vqgan"  # The network that `decode_pixels` computes.
NETWORK = ("stem", "downsample", "encoder_blocks", "decoder_blocks", "local_codes")
CODES = ("num_codes", "token_offset", "levels")  # `levels` of FSQ; of other quantizers empty.
DTYPES = {"F32": "<f4", "F16": "<f2"}
ROWS = 16  # Of an image, convolved at a time: more take more memory.


class Tokenizer(NamedTuple):
  """A stored image tokenizer.

  Attributes:
    config: fields of `NETWORK` and `CODES`, and "side" in codes.
    tensors: name -> fp32.
  """

  config: dict
  tensors: dict[str, np.ndarray]


def read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Reads a safetensors file: 8 bytes with the length of a JSON header, the header, the tensors.

  Raises:
    ValueError: it is damaged, or a tensor has a type other than those of `DTYPES`.
  """
  data = path.read_bytes()
  try:
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    tensors = {}
    for name, about in header.items():
      if name == "__metadata__":
        continue
      if about["dtype"] not in DTYPES:
        raise ValueError(f"tensor '{name}' is {about['dtype']}, not one of {', '.join(DTYPES)}")
      start, stop = about["data_offsets"]
      flat = np.frombuffer(data[8 + length + start : 8 + length + stop], DTYPES[about["dtype"]])
      tensors[name] = flat.reshape(about["shape"]).astype(np.float32)
  except (struct.error, KeyError, TypeError, AttributeError, ValueError) as error:
    raise ValueError(f"{path} cannot be read ({error}): get the file again.") from error
  return tensors


def tokenizer_of(config: dict, tensors: dict[str, np.ndarray]) -> Tokenizer:
  """Makes a tokenizer of the content of config.json and params.safetensors."""
  network = config["vqgan"]
  about = {name: network[name] for name in NETWORK}
  about["side"] = network["resolution"] // network["downsample"]
  about |= {name: config[name] for name in CODES}
  return Tokenizer(about, tensors)


@functools.lru_cache(2)
def load(folder: Folder | None = None) -> Tokenizer:
  """Reads the tokenizer in a folder, by default that of this script.

  Raises:
    FileNotFoundError: a file is absent.
    ValueError: a file is damaged, or of another network than this script computes.
  """
  path = pathlib.Path(__file__).resolve().parent if folder is None else pathlib.Path(folder)
  for name in ("config.json", "params.safetensors"):
    if not (path / name).is_file():
      raise FileNotFoundError(f"{path} has no {name}: copy the whole folder of the export again.")
  try:
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    found = config["format"]
    if found == FORMAT:
      return tokenizer_of(config, read_safetensors(path / "params.safetensors"))
  except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
    raise ValueError(f"{path / 'config.json'} is damaged ({error!r}): get it again.") from error
  raise ValueError(
    f"{path / 'config.json'} has the format {found!r}, and this script decodes {FORMAT!r}: use the "
    "script that came with the file."
  )


def convolve(x: np.ndarray, kernel: np.ndarray, bias: np.ndarray, stride: int = 1) -> np.ndarray:
  """Convolves [H, W, C] with a square kernel [k, k, C, D], zeros around it.

  Returns:
    [H / stride, W / stride, D].
  """
  size, around = len(kernel), len(kernel) - stride
  x = np.pad(x, ((around // 2, around - around // 2),) * 2 + ((0, 0),))
  windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), (0, 1))[::stride, ::stride]
  matrix = kernel.transpose(2, 0, 1, 3).reshape(-1, kernel.shape[-1])
  result = np.empty((*windows.shape[:2], kernel.shape[-1]), np.float32)
  for start in range(0, len(windows), ROWS):
    rows = windows[start : start + ROWS]
    result[start : start + ROWS] = rows.reshape(*rows.shape[:2], -1) @ matrix
  return result + bias


def normalize(x: np.ndarray, local: bool) -> np.ndarray:
  """Shifts and scales [H, W, C] to mean 0 and variance 1: all of it, or each place over C."""
  axes = 2 if local else (0, 1, 2)
  x = x - x.mean(axes, keepdims=True)
  return x / np.sqrt(np.mean(x * x, axes, keepdims=True) + np.float32(1e-5))


def silu(x: np.ndarray) -> np.ndarray:
  """Computes x times its logistic function."""
  return x / (1 + np.exp(np.minimum(-x, 80)))


def unit(x: np.ndarray) -> np.ndarray:
  """Scales vectors along the last axis to norm 1."""
  return x / np.sqrt(np.sum(x * x, -1, keepdims=True) + np.float32(1e-12))


def space_to_depth(x: np.ndarray, factor: int) -> np.ndarray:
  """Folds squares of pixels into channels: [factor H, factor W, C] -> [H, W, factor^2 C]."""
  height, width, channels = x.shape
  x = x.reshape(height // factor, factor, width // factor, factor, channels)
  return x.transpose(0, 2, 1, 3, 4).reshape(height // factor, width // factor, -1)


def depth_to_space(x: np.ndarray, factor: int) -> np.ndarray:
  """Unfolds channels to squares of pixels: [H, W, factor^2 C] -> [factor H, factor W, C]."""
  height, width, channels = x.shape
  x = x.reshape(height, width, factor, factor, channels // factor**2)
  return x.transpose(0, 2, 1, 3, 4).reshape(height * factor, width * factor, -1)


def conv(tokenizer: Tokenizer, name: str, x: np.ndarray, stride: int = 1) -> np.ndarray:
  """Applies the convolution of this name."""
  tensors = tokenizer.tensors
  return convolve(x, tensors[f"{name}.kernel"], tensors[f"{name}.bias"], stride)


def blocks(tokenizer: Tokenizer, name: str, count: int, x: np.ndarray) -> np.ndarray:
  """Applies `count` residual blocks of two convolutions each."""
  local = tokenizer.config["local_codes"]
  for block in (f"{name}.{i}" for i in range(count)):
    inner = conv(tokenizer, f"{block}.conv1", silu(normalize(x, local)))
    x = x + conv(tokenizer, f"{block}.conv2", silu(normalize(inner, local)))
  return x


def code_vectors(tokenizer: Tokenizer) -> np.ndarray:
  """Returns the vectors of all codes as the decoder receives them, fp32 [K, E].

  Those of FSQ (Mentzer et al. 2023) are all combinations of levels, the first channel's changing
  fastest; others have norm 1, and those of SimVQ (Zhu et al. 2024) a matrix before that.
  """
  if levels := tokenizer.config["levels"]:
    digits = np.unravel_index(np.arange(tokenizer.config["num_codes"]), levels, order="F")
    half = np.array(levels) // 2
    return ((np.stack(digits, -1) - half) / half).astype(np.float32)
  table = tokenizer.tensors["codebook.table"]
  if "codebook.projection" in tokenizer.tensors:
    table = table @ tokenizer.tensors["codebook.projection"]
  return unit(table)


def decode_pixels(tokenizer: Tokenizer, codes: np.ndarray) -> np.ndarray:
  """Decodes the codes of one image, int [T], to fp32 [H, W, 3], about in [-1, 1].

  The decoder of a VQGAN (Esser et al. 2021).
  """
  config = tokenizer.config
  x = code_vectors(tokenizer)[codes].reshape(config["side"], config["side"], -1)
  x = conv(tokenizer, "decoder.conv_in", x)
  for level, count in enumerate(config["decoder_blocks"][::-1]):
    if level:
      x = depth_to_space(conv(tokenizer, f"decoder.ups.{level - 1}", silu(x)), 2)
    x = blocks(tokenizer, f"decoder.levels.{level}", count, x)
  x = conv(tokenizer, "decoder.conv_out", silu(normalize(x, config["local_codes"])))
  return depth_to_space(x, config["stem"])


def squashed(x: np.ndarray, levels: npt.ArrayLike) -> np.ndarray:
  """Brings encodings [..., E] into the range of FSQ's codes, in steps of 1 / (L // 2)."""
  levels = np.array(levels)
  half, offset = (levels - 1) * 1.001 / 2, np.where(levels % 2, 0, 0.5)
  return ((np.tanh(x + np.arctanh(offset / half)) * half - offset) / (levels // 2)).astype("f4")


def scores(tokenizer: Tokenizer, pixels: np.ndarray) -> np.ndarray:
  """Scores all codes for the places of an image; the largest score is that of the nearest code.

  Args:
    tokenizer: of the image.
    pixels: fp32 [H, W, 3] in [-1, 1].

  Returns:
    [T, K], minus half of the squared distances, up to a constant of each place.
  """
  config = tokenizer.config
  x = conv(tokenizer, "encoder.conv_in", space_to_depth(pixels, config["stem"]))
  for level, count in enumerate(config["encoder_blocks"]):
    if level:
      x = conv(tokenizer, f"encoder.downs.{level - 1}", silu(x), stride=2)
    x = blocks(tokenizer, f"encoder.levels.{level}", count, x)
  x = conv(tokenizer, "encoder.conv_out", normalize(x, config["local_codes"]))
  z = squashed(x, config["levels"]) if config["levels"] else unit(x)
  codes = code_vectors(tokenizer)
  return z.reshape(-1, z.shape[-1]) @ codes.T - np.sum(codes * codes, -1) / 2


def to_uint8(pixels: np.ndarray) -> np.ndarray:
  """Converts pixels in [-1, 1] to uint8, rounded and clipped."""
  return np.clip(np.round((pixels + 1) * 127.5), 0, 255).astype(np.uint8)


def decode(codes: npt.ArrayLike, folder: Folder | None = None) -> np.ndarray:
  """Decodes codes to images.

  Args:
    codes: integers [B, T] in [0, K), row by row of the image.
    folder: of config.json and params.safetensors, by default that of this script.

  Returns:
    uint8 [B, H, W, 3].

  Raises:
    ValueError: the shape differs, or a code lies outside [0, K).
  """
  tokenizer = load(folder)
  count, num_codes = tokenizer.config["side"] ** 2, tokenizer.config["num_codes"]
  codes = np.asarray(codes)
  if codes.ndim != 2 or codes.shape[1] != count or codes.dtype.kind not in "iu":
    raise ValueError(
      f"codes are an array of {codes.dtype} of the shape {codes.shape}; they must be integers of "
      f"the shape (images, {count})."
    )
  for image, place in np.argwhere((codes < 0) | (codes >= num_codes)):
    raise ValueError(
      f"code {place} of image {image} is {codes[image, place]}; codes are 0 to {num_codes - 1} "
      f"(ids of the language model are {tokenizer.config['token_offset']} larger: `--ids`, or "
      "`codes_of`, reads them)."
    )
  side = tokenizer.config["side"] * tokenizer.config["downsample"]
  images = np.empty((len(codes), side, side, 3), np.uint8)
  for i, row in enumerate(codes):
    images[i] = to_uint8(decode_pixels(tokenizer, row))
  return images


def encode(images: npt.ArrayLike, folder: Folder | None = None) -> np.ndarray:
  """Encodes images to codes, int64 [B, T], row by row of the image.

  Args:
    images: uint8 [B, H, W, 3] of the size that the tokenizer was trained for.
    folder: as in `decode`.

  Raises:
    ValueError: shape or dtype differ.
  """
  tokenizer = load(folder)
  side = tokenizer.config["side"] * tokenizer.config["downsample"]
  images = np.asarray(images)
  if images.shape[1:] != (side, side, 3) or images.dtype != np.uint8:
    raise ValueError(
      f"images are an array of {images.dtype} of the shape {images.shape}; they must be uint8 of "
      f"the shape (images, {side}, {side}, 3)."
    )
  codes = np.empty((len(images), tokenizer.config["side"] ** 2), np.int64)
  for i, image in enumerate(images):
    codes[i] = scores(tokenizer, image.astype(np.float32) / 127.5 - 1).argmax(-1)
  return codes


def codes_of(ids: npt.ArrayLike, folder: Folder | None = None) -> np.ndarray:
  """Finds the images in token ids of the language model.

  With offset 512, 4 codes an image:
    [1, 300, 3, 512, 514, 513, 515, 1] -> [[0, 2, 1, 3]]

  Args:
    ids: a sequence: prompt, texts and codes.
    folder: as in `decode`.

  Returns:
    Codes, int64 [B, T].

  Raises:
    ValueError: there is no image, or one of another length than T.
  """
  config = load(folder).config
  offset, count = config["token_offset"], config["side"] ** 2
  ids = np.asarray(ids)
  if ids.ndim != 1 or ids.dtype.kind not in "iu":
    raise ValueError(
      f"ids are an array of {ids.dtype} of the shape {ids.shape}; they must be a list of integers."
    )
  is_code = (ids >= offset) & (ids < offset + config["num_codes"])
  edges = np.flatnonzero(np.diff(is_code, prepend=False, append=False)).reshape(-1, 2)
  if not len(edges):
    raise ValueError(
      f"none of the {len(ids)} ids is an image code; image codes are the ids {offset} to "
      f"{offset + config['num_codes'] - 1}."
    )
  for start, stop in edges:
    if stop - start != count:
      raise ValueError(
        f"ids at places {start} to {stop - 1} are {stop - start} image codes in a row; an image "
        f"has {count}."
      )
  return np.array([ids[start:stop] for start, stop in edges]) - offset


def read_rows(path: pathlib.Path) -> list[list[int]]:
  """Reads a JSON file: a list of integers, or a list of such lists.

  Raises:
    ValueError: it holds something else.
  """
  try:
    values = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise ValueError(f"it is not valid JSON ({error}).") from error
  rows = values if isinstance(values, list) and values and isinstance(values[0], list) else [values]
  if not all(isinstance(row, list) and row and all(type(x) is int for x in row) for row in rows):
    raise ValueError("it must hold a list of integers, or a list of such lists.")
  return rows


def read_codes(path: pathlib.Path, are_ids: bool) -> np.ndarray:
  """Reads the codes [B, T] of all images of a file; raises ValueError, see `codes_of`."""
  rows = read_rows(path)
  if are_ids:
    return np.array([codes for row in rows for codes in codes_of(row)])
  side = load().config["side"]
  for i, row in enumerate(rows):
    if len(row) != side**2:
      raise ValueError(
        f"image {i} has {len(row)} codes; it must have {side**2}, {side} rows of {side}."
      )
  return np.array(rows)


def run(source: pathlib.Path, target: pathlib.Path, are_ids: bool) -> None:
  """Writes the images of a file and prints their names; raises as `decode` and `codes_of`."""
  try:
    from PIL import Image
  except ImportError as error:
    raise ValueError("Pillow writes the images, and is missing: `pip install pillow`.") from error
  load()
  if not source.is_file():
    raise ValueError(f"there is no file {source}: name a JSON file of codes, or of ids and --ids.")
  try:
    images = decode(read_codes(source, are_ids))
  except ValueError as error:
    raise ValueError(f"{source}: {error}") from error
  for i, image in enumerate(images):
    name = target.name if len(images) == 1 else f"{target.stem}_{i}{target.suffix}"
    Image.fromarray(image).save(target.with_name(name))
    print(target.with_name(name))


def main() -> None:
  """Runs the command; a mistake is one sentence and the exit code 2."""
  parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
  parser.add_argument("codes", type=pathlib.Path, help="JSON file: codes, or lists of codes")
  parser.add_argument("image", type=pathlib.Path, help="image file to write")
  parser.add_argument("--ids", action="store_true", help="the file has token ids, not codes")
  flags = parser.parse_args()
  try:
    run(flags.codes, flags.image, flags.ids)
  except (OSError, ValueError) as error:
    parser.error(str(error))


if __name__ == "__main__":
  main()

"""Decodes image codes to images, and encodes images, with PyTorch on the CPU.

  pip install numpy pillow safetensors torch
  python decode_image.py codes.json image.png
  python decode_image.py --ids generated.json image.png

codes.json contains the codes of one image, a list of integers row by row, or a list of such lists.
With --ids, the file contains token ids of the language model; each unbroken sequence of image codes
is one image. Several images are written to image_0.png, image_1.png, ... As a module, it provides
`decode`, `encode` and `codes_of`. config.json and params.safetensors are read from the folder of
this script.
"""

# B images, H height, W width, C channels, E code width, K codes, T codes per image.

import argparse
from collections.abc import Sequence
import functools
import json
import pathlib

import numpy as np
import numpy.typing as npt
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
import torch
import torch.nn.functional as F

Folder = str | pathlib.PurePath | None


class Tokenizer:
  """VQGAN (Esser et al. 2021) from the contents of config.json and params.safetensors."""

  def __init__(self, config: dict, tensors: dict[str, torch.Tensor]):
    if config["format"] != "cm3leon_jax.vqgan":
      raise ValueError(f"this script does not decode the format {config['format']}")
    self.config, self.tensors = config | config["vqgan"], tensors
    self.size, self.num_codes = self.config["resolution"], self.config["num_codes"]
    self.side = self.size // self.config["downsample"]
    if self.config["quantizer"] == "fsq":  # Mentzer et al. 2023. The first level changes fastest.
      self.levels = torch.tensor(config["levels"], dtype=torch.float64)
      digits = torch.unravel_index(torch.arange(self.num_codes), config["levels"][::-1])
      self.codes = (torch.stack(digits[::-1], -1) / (self.levels // 2) - 1).float()
    else:
      self.codes = unit(tensors["codebook.table"].float())

  def conv(self, name: str, x: torch.Tensor, stride: int = 1) -> torch.Tensor:
    """Applies the convolution with this name to [B, C, H, W]."""
    kernel = self.tensors[f"{name}.kernel"].float().permute(3, 2, 0, 1)
    padding = (kernel.shape[-1] - stride) // 2
    return F.conv2d(x, kernel, self.tensors[f"{name}.bias"].float(), stride, padding)

  def normalize(self, x: torch.Tensor) -> torch.Tensor:
    """Normalizes each image, or each position if `local_codes`, to mean 0 and variance 1."""
    axes = 1 if self.config["local_codes"] else (1, 2, 3)
    variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    return (x - mean) * torch.rsqrt(variance + 1e-5)

  def network(self, part: str, x: torch.Tensor) -> torch.Tensor:
    """Applies a part, "encoder" or "decoder", to [B, C, H, W]."""
    decodes = part == "decoder"
    x = self.conv(f"{part}.conv_in", x)
    for level, count in enumerate(self.config[f"{part}_blocks"][:: -1 if decodes else 1]):
      if level and decodes:
        x = depth_to_space(self.conv(f"{part}.ups.{level - 1}", F.silu(x)), 2)
      elif level:
        x = self.conv(f"{part}.downs.{level - 1}", F.silu(x), stride=2)
      for block in (f"{part}.levels.{level}.{i}" for i in range(count)):
        h = self.conv(f"{block}.conv1", F.silu(self.normalize(x)))
        x = x + self.conv(f"{block}.conv2", F.silu(self.normalize(h)))
    x = self.normalize(x)
    return self.conv(f"{part}.conv_out", F.silu(x) if decodes else x)

  def decode(self, codes: torch.Tensor) -> torch.Tensor:
    """Decodes codes [T] to pixels [H, W, 3], approximately in [-1, 1]."""
    x = self.network("decoder", self.codes[codes].T.reshape(1, -1, self.side, self.side))
    return depth_to_space(x, self.config["stem"])[0].permute(1, 2, 0)

  def scores(self, pixels: torch.Tensor) -> torch.Tensor:
    """Returns the scores [T, K] of all codes for pixels [H, W, 3]: nearer codes score higher."""
    x, side = pixels.permute(2, 0, 1)[None], self.config["stem"]
    z = self.network("encoder", space_to_depth(x, side))[0].flatten(1).T
    if self.config["quantizer"] == "fsq":
      half, offset = (self.levels - 1) * 1.001 / 2, (1 - self.levels % 2) / 2
      z = (torch.tanh(z + torch.atanh(offset / half)) * half - offset) / (self.levels // 2)
    else:
      z = unit(z)
    return z.float() @ self.codes.T - self.codes.square().sum(-1) / 2


def unit(x: torch.Tensor) -> torch.Tensor:
  """Scales vectors along the last axis to unit length."""
  return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-12)


def space_to_depth(x: torch.Tensor, factor: int) -> torch.Tensor:
  """Moves squares of pixels into channels, [B, 3, H, W] -> [B, 3 factor^2, H / factor, ...]."""
  return F.pixel_unshuffle(x, factor).unflatten(1, (-1, factor**2)).transpose(1, 2).flatten(1, 2)


def depth_to_space(x: torch.Tensor, factor: int) -> torch.Tensor:
  """Inverts `space_to_depth`."""
  return F.pixel_shuffle(x.unflatten(1, (factor**2, -1)).transpose(1, 2).flatten(1, 2), factor)


def to_uint8(pixels: torch.Tensor) -> np.ndarray:
  """Converts pixels in [-1, 1] to uint8, rounded and clipped."""
  return ((pixels + 1) * 127.5).round().clip(0, 255).byte().numpy()


@functools.lru_cache(2)
def load(folder: Folder = None) -> Tokenizer:
  """Loads the tokenizer in a folder; raises ValueError if a file is absent or damaged."""
  path = pathlib.Path(folder or pathlib.Path(__file__).resolve().parent)
  try:
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    return Tokenizer(config, load_file(path / "params.safetensors"))
  except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
    reason = f"{path} cannot be read ({type(error).__name__}: {error})"
    raise ValueError(f"{reason}: copy the whole folder of the export again.") from error


def decode(codes: Sequence[npt.ArrayLike] | np.ndarray, folder: Folder = None) -> np.ndarray:
  """Decodes codes [B, T] to uint8 images [B, H, W, 3]. Raises ValueError for invalid codes."""
  tokenizer = load(folder)
  side, size, num_codes = tokenizer.side, tokenizer.size, tokenizer.num_codes
  images = []
  for i, row in enumerate(map(np.asarray, codes)):
    if row.shape != (side**2,) or row.dtype.kind not in "iu":
      found = f"the codes of image {i} are {row.dtype} of the shape {row.shape}"
      raise ValueError(f"{found}; they must be {side**2} integers, {side} rows of {side}.")
    for place in np.flatnonzero((row < 0) | (row >= num_codes)):
      found = f"code {place} of image {i} is {row[place]}; codes are 0 to {num_codes - 1}"
      raise ValueError(
        f"{found} (if these are token ids of the language model, use --ids or `codes_of`)."
      )
    images.append(to_uint8(tokenizer.decode(torch.tensor(row.astype(np.int64)))))
  return np.array(images, np.uint8).reshape(-1, size, size, 3)


def encode(images: npt.ArrayLike, folder: Folder = None) -> np.ndarray:
  """Encodes uint8 images [B, H, W, 3] to int64 codes [B, T]. Raises ValueError for other images."""
  tokenizer, images = load(folder), np.asarray(images)
  size = tokenizer.size
  if images.shape[1:] != (size, size, 3) or images.dtype != np.uint8:
    result = f"images are {images.dtype} of the shape {images.shape}"
    raise ValueError(f"{result}; they must be uint8 with the shape (images, {size}, {size}, 3).")
  codes = [tokenizer.scores(x).argmax(-1).numpy() for x in torch.tensor(images) / 127.5 - 1]
  return np.array(codes, np.int64).reshape(-1, tokenizer.side**2)


def codes_of(ids: npt.ArrayLike, folder: Folder = None) -> np.ndarray:
  """Finds the codes [B, T] of all images in token ids. Raises ValueError for an incomplete image.

  With token_offset 512 and 4 codes per image:
    [1, 300, 3, 512, 514, 513, 515, 1] -> [[0, 2, 1, 3]]
  """
  tokenizer, ids = load(folder), np.asarray(ids)
  if ids.ndim != 1 or ids.dtype.kind not in "iu":
    raise ValueError(
      f"ids are {ids.dtype} of the shape {ids.shape}; they must be a list of integers."
    )
  first, count = tokenizer.config["token_offset"], tokenizer.side**2
  last = first + tokenizer.num_codes - 1
  is_code = (ids >= first) & (ids <= last)
  edges = np.flatnonzero(np.diff(is_code, prepend=False, append=False)).reshape(-1, 2)
  lengths = [int(stop - start) for start, stop in edges]
  if set(lengths) != {count}:
    result = f"ids contain runs of {lengths} image codes (ids {first} to {last})"
    raise ValueError(f"{result}; there must be at least one run, and each must have {count} codes.")
  return np.array([ids[start:stop] for start, stop in edges]) - first


def main() -> None:
  """Runs the command. Reports invalid input in one sentence, with exit code 2."""
  parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
  parser.add_argument("codes", type=pathlib.Path, help="JSON file: codes, or lists of codes")
  parser.add_argument("image", type=pathlib.Path, help="image file to write")
  parser.add_argument("--ids", action="store_true", help="the file has token ids, not codes")
  flags = parser.parse_args()
  try:
    rows = json.loads(flags.codes.read_text(encoding="utf-8"))
    if not (rows and isinstance(rows, list) and isinstance(rows[0], list)):
      rows = [rows]
    images = decode(np.concatenate([codes_of(row) for row in rows]) if flags.ids else rows)
    for i, image in enumerate(images):
      number = f"_{i}" if len(images) > 1 else ""
      path = flags.image.with_stem(flags.image.stem + number)
      Image.fromarray(image).save(path)
      print(path)
  except (OSError, ValueError) as error:
    parser.error(f"cannot decode {flags.codes}: {error}")


if __name__ == "__main__":
  main()

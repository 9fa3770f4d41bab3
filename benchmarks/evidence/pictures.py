"""Measures an image tokenizer on held-out pictures of several kinds, at several resolutions.

  python -m benchmarks.evidence.pictures --data=pictures_data --tokenizer=workdir/pictures/vqgan

`data` is a folder of examples/pictures/make_data.py. Prints a table, and writes a sheet of pictures
(left) and reconstructions (right).
"""

from collections.abc import Sequence
import dataclasses
import json
import pathlib

from absl import app, flags
import cv2
import numpy as np
from PIL import Image

from cm3leon_jax.data.raw import reader
from cm3leon_jax.tokenizers.vqgan import ImageTokenizer
from cm3leon_jax.training.image_models import vqgan_measures

# n images, H height, W width.

SIDES = (32, 48, 64, 128)
MAIN = 48  # Side of the pictures whose codes are counted, and of those in the sheet.
DRAWINGS = ("drawing", "artist")  # Kinds that the aim for drawings is about.
WHITE = (100.0, 0.0, 0.0)  # In Lab.
BACKGROUND = 10.0  # Pixels within this distance of white in Lab are background.
THREADS = 2


def lab(images: np.ndarray) -> np.ndarray:
  """Converts uint8 [n, H, W, 3] to CIE Lab, fp32."""
  flat = images.reshape(1, -1, 3).astype(np.float32) / 255
  return cv2.cvtColor(flat, cv2.COLOR_RGB2LAB).reshape(images.shape)


def color_error(images: np.ndarray, others: np.ndarray) -> float:
  """Returns the mean distance in Lab between the mean colors of what is not background.

  `images` decide what is background: pixels near white.
  """
  before, after = lab(images), lab(others)
  front = np.linalg.norm(before - np.array(WHITE, np.float32), axis=-1) > BACKGROUND
  means = [(x * front[..., None]).sum((1, 2)) for x in (before, after)]
  counts = front.sum((1, 2))
  distances = np.linalg.norm(means[0] - means[1], axis=-1)[counts > 0] / counts[counts > 0]
  return float(distances.mean())


def at(tokenizer: ImageTokenizer, side: int) -> ImageTokenizer:
  """Returns the tokenizer for images of another side."""
  config = dataclasses.replace(tokenizer.config, resolution=side)
  return dataclasses.replace(tokenizer, config=config)


def measure(tokenizer: ImageTokenizer, paths: dict[str, list], sides: Sequence[int] = SIDES):
  """Returns (rows of the table, codes of the drawings at MAIN pixels)."""
  rows, codes = [], []
  for kind, of_kind in paths.items():
    for side in sides:
      images = reader.load_images(of_kind, side, THREADS)
      found = at(tokenizer, side)
      encoded = found.encode(images)
      decoded = found.decode(encoded)
      errors = np.maximum(vqgan_measures.mean_squared_errors(images, decoded), 1e-10)
      row = {"kind": kind, "side": side, "images": len(images)}
      row["psnr_db"] = float(np.mean(-10 * np.log10(errors)))
      row["psnr_of_mean_mse_db"] = float(-10 * np.log10(errors.mean()))
      row["lab"] = color_error(images, decoded)
      rows.append(row)
      if side == MAIN:
        codes.append((kind, encoded))
  return rows, codes


def usage(codes: Sequence[np.ndarray], num_codes: int) -> str:
  every = np.concatenate([x.ravel() for x in codes])
  used, perplexity = len(np.unique(every)), vqgan_measures.perplexity(every, num_codes)
  return f"{used / num_codes:.1%} of {num_codes:,} codes, perplexity {perplexity:.0f}"


def sheet(tokenizer: ImageTokenizer, paths: dict[str, list], count: int = 12) -> Image.Image:
  """Draws `count` pictures of each kind above their reconstructions."""
  rows, found = [], at(tokenizer, MAIN)
  for of_kind in paths.values():
    images = reader.load_images(of_kind[:count], MAIN, THREADS)
    images = np.concatenate([images, found.decode(found.encode(images))])
    rows += [np.pad(row, ((2, 2), (2, 2), (0, 0)), constant_values=128) for row in images]
  lines = [np.concatenate(rows[i : i + count], 1) for i in range(0, len(rows), count)]
  drawn = Image.fromarray(np.concatenate(lines))
  return drawn.resize((2 * drawn.width, 2 * drawn.height), Image.Resampling.NEAREST)


def heldout_paths(data: pathlib.Path) -> dict[str, list]:
  """Returns kind -> paths of the held-out pictures of a folder."""
  paths: dict[str, list] = {}
  for line in (data / "pairs.jsonl").read_text(encoding="utf-8").splitlines():
    record = json.loads(line)
    if record["split"] == "heldout":
      paths.setdefault(record["facts"]["kind"], []).append(data / record["image"])
  return paths


def main(argv) -> None:
  del argv
  args = flags.FLAGS
  tokenizer, paths = ImageTokenizer.load(args.tokenizer), heldout_paths(pathlib.Path(args.data))
  rows, codes = measure(tokenizer, paths)
  print(
    "| kind | pixels | images | PSNR in dB | PSNR of mean error | Lab |\n|---|---|---|---|---|---|"
  )
  for row in rows:
    print(
      f"| {row['kind']} | {row['side']} | {row['images']} | {row['psnr_db']:.2f} | "
      f"{row['psnr_of_mean_mse_db']:.2f} | {row['lab']:.1f} |"
    )
  drawings = [x for kind, x in codes if kind in DRAWINGS]
  size = tokenizer.num_codes
  every = usage([x for _, x in codes], size)
  print(f"codes at {MAIN} pixels: drawings {usage(drawings, size)}; all kinds {every}.")
  sheet(tokenizer, paths).save(args.sheet)


if __name__ == "__main__":
  flags.DEFINE_string("tokenizer", None, "Folder of the tokenizer.", required=True)
  flags.DEFINE_string("data", "pictures_data", "Folder of the pictures.")
  flags.DEFINE_string("sheet", "pictures.png", "Image to write.")
  app.run(main)

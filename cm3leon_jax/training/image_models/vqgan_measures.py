"""Measures the reconstructions and codes of an image tokenizer."""

# n images, H height, W width, K codes.

import math
from typing import Protocol, runtime_checkable

from etils import epath
import numpy as np

from cm3leon_jax.errors import UserError
from cm3leon_jax.files.atomic import replacing
from cm3leon_jax.tokenizers.vqgan import ImageTokenizer

RECONSTRUCTIONS = "reconstructions.npz"
NUM_RECONSTRUCTIONS = 32
NUM_TRAIN_MEASURED = 1_024
MAX_HELDOUT = 4_096


@runtime_checkable
class ImageRows(Protocol):
  """Images uint8 [n, H, W, 3]: an array, or files on disk (`reader.ImageFiles`)."""

  def __len__(self) -> int:
    """Returns n."""

  def __getitem__(self, rows: np.ndarray, /) -> np.ndarray:
    """Returns the images with the indices `rows`."""


def mean_squared_errors(images: np.ndarray, reconstructions: np.ndarray) -> np.ndarray:
  """Computes the mean squared error of each image, for pixels in [0, 1]: fp64 [n].

  The PSNR in dB is -10 log10 of the error.
  """
  return np.mean((images.astype(np.float64) - reconstructions) ** 2, axis=(1, 2, 3)) / 255**2


def perplexity(codes: np.ndarray, num_codes: int) -> float:
  """Computes exp(entropy) of the codes: from 1 (only one code) to K (K equally frequent codes)."""
  p = np.bincount(codes.ravel(), minlength=num_codes) / codes.size
  return float(np.exp(-np.sum(p * np.log(np.where(p > 0, p, 1)))))


def evaluate(
  tokenizer: ImageTokenizer,
  images: ImageRows,
  train_images: ImageRows,
  folder: epath.PathLike,
) -> dict:
  """Measures reconstructions of up to 4,096 held-out images, and codes of 1,024 training images.

  Also writes reconstructions.npz.

  Returns:
    A dict with
      psnr_db: mean PSNR of the held-out images.
      psnr_of_mean_mse_db: PSNR of the mean squared error over all held-out images.
      psnr_of_one_color_db: the same if every reconstruction were the mean color of all images.
      codebook_perplexity, codes_used: for the codes of held-out images.
      train_codebook_perplexity, train_codes_used: for the codes of training images.
      bits_per_image: number of bits that an image's codes take under a model that knows only the
        frequencies of the codes in training images.
  """
  images = images[np.arange(min(len(images), MAX_HELDOUT))]
  codes = tokenizer.encode(images)
  reconstructions = tokenizer.decode(codes)
  train_codes = tokenizer.encode(train_images[evenly_spaced(len(train_images), NUM_TRAIN_MEASURED)])
  shown = evenly_spaced(len(images), NUM_RECONSTRUCTIONS)
  with replacing(epath.Path(folder) / RECONSTRUCTIONS) as file:
    np.savez_compressed(file, originals=images[shown], reconstructions=reconstructions[shown])
  errors = np.maximum(mean_squared_errors(images, reconstructions), 1e-10)
  one_color = np.broadcast_to(images.mean((0, 1, 2)), images.shape)
  color_error = max(mean_squared_errors(images, one_color).mean(), 1e-10)
  train_perplexity = perplexity(train_codes, tokenizer.num_codes)
  return {
    "psnr_db": float(np.mean(-10 * np.log10(errors))),
    "psnr_of_mean_mse_db": float(-10 * np.log10(errors.mean())),
    "psnr_of_one_color_db": float(-10 * np.log10(color_error)),
    "codebook_perplexity": perplexity(codes, tokenizer.num_codes),
    "codes_used": len(np.unique(codes)),
    "train_codebook_perplexity": train_perplexity,
    "train_codes_used": len(np.unique(train_codes)),
    "bits_per_image": math.log2(train_perplexity) * tokenizer.config.image_tokens,
  }


def check_learned(measures: dict) -> None:
  """Raises UserError if the measures of `evaluate` show that a VQGAN is not usable."""
  result, color = measures["psnr_of_mean_mse_db"], measures["psnr_of_one_color_db"]
  if measures["codes_used"] == measures["train_codes_used"] == 1:
    what = "gives every image the same code"
  elif not result > color:
    what = f"reconstructs held-out images worse ({result:.1f} dB) than one color ({color:.1f} dB)"
  else:
    return
  raise UserError(
    f"the image tokenizer {what}: train it longer (config.vqgan.steps) or with another "
    "config.vqgan.learning_rate."
  )


def evenly_spaced(length: int, count: int) -> np.ndarray:
  """Returns at most `count` different indices from 0 to `length` - 1."""
  return np.unique(np.linspace(0, length - 1, count).astype(int))

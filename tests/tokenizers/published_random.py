"""Writes a small image tokenizer of aMUSEd's layout with random weights."""

import dataclasses

import numpy as np

from cm3leon_jax.tokenizers import published, published_files
from cm3leon_jax.tokenizers.vqgan import ImageTokenizer

FAMILY = dataclasses.replace(
  published.FAMILIES["amused"], widths=(8,) * 5, latent_channels=4, code_dim=4, groups=4, blocks=1
)


def save_random(folder, num_codes: int) -> ImageTokenizer:
  """Saves random weights with diffusers' names and config; returns their tokenizer."""
  rng, tensors = np.random.default_rng(0), {}
  for name, shape in published_files.tensor_shapes(FAMILY, num_codes).items():
    scale = np.prod(shape[1:]) ** -0.5 if len(shape) == 4 else 1 if len(shape) == 2 else 0.3
    around = float("norm" in name and name.endswith("weight"))
    tensors[name] = rng.normal(around, scale, shape).astype(np.float32)
  params = published_files.from_tensors(tensors, FAMILY, num_codes)
  tokenizer = ImageTokenizer(FAMILY, num_codes, params, 4)
  published_files.save_diffusers(folder, tokenizer)
  return tokenizer

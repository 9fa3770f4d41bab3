"""Writes a small image tokenizer of a published layout with random weights."""

import dataclasses
import pathlib

import numpy as np
from safetensors.numpy import save_file

from cm3leon_jax.files.json_files import write_json
from cm3leon_jax.tokenizers import published, published_files
from cm3leon_jax.tokenizers.published_source import DIFFUSERS
from cm3leon_jax.tokenizers.vqgan import ImageTokenizer

FAMILY = dataclasses.replace(
  published.FAMILIES["amused"], widths=(8,) * 5, latent_channels=4, code_dim=4, groups=4, blocks=1
)


def save_random(folder, num_codes: int, seed: int = 0, family=FAMILY) -> ImageTokenizer:
  """Saves random weights with a family's names, aMUSEd's with config; returns their tokenizer."""
  rng, tensors = np.random.default_rng(seed), {}
  for name, shape in published_files.tensor_shapes(family, num_codes).items():
    scale = np.prod(shape[1:]) ** -0.5 if len(shape) == 4 else 1 if len(shape) == 2 else 0.3
    around = float("norm" in name and name.endswith("weight"))
    tensors[name] = rng.normal(around, scale, shape).astype(np.float32)
  pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
  save_file(tensors, pathlib.Path(folder) / DIFFUSERS)
  config = {theirs: getattr(family, ours) for ours, theirs in published_files.SIZES.items()}
  config |= {name: value for name, (value, _) in published_files.FIXED.items()}
  levels = len(family.widths)
  config |= {
    "num_vq_embeddings": num_codes,
    "down_block_types": ["DownEncoderBlock2D"] * levels,
    "up_block_types": ["UpDecoderBlock2D"] * levels,
    "lookup_from_codebook": True,
  }
  if family.family == "amused":
    write_json(pathlib.Path(folder) / "config.json", config)
  params = published_files.from_tensors(tensors, family, num_codes)
  return ImageTokenizer(family, num_codes, params, 4)

"""Writes the image tokenizer to an export.

For a tokenizer of `cm3leon train_vqgan`, DIR/image_tokenizer/ has three files: config.json,
params.safetensors from the run's vqgan/, and decode_image.py, which needs PyTorch but not JAX.
config.json adds fields to the run's file, so `ImageTokenizer.load` can read the folder.
decode_image.py reads `vqgan`, `num_codes`, the `levels` of FSQ, and `token_offset` from
config.json. Code c is token `token_offset + c` of the language model. Of a published tokenizer, the
run's files are copied, which only this project reads; other programs read its release.
"""

# K codes, T codes per image.

import dataclasses
import importlib.resources
import importlib.util
import shutil

from etils import epath
from flax import traverse_util
import jax
import numpy as np

from cm3leon_jax.config.tokenizers import VQGANConfig, levels_of
from cm3leon_jax.errors import UserError
from cm3leon_jax.files.atomic import replacing
from cm3leon_jax.files.json_files import read_json, write_json
from cm3leon_jax.run.run import Run
from cm3leon_jax.run.source import IMAGES
from cm3leon_jax.tokenizers.published import PublishedConfig
from cm3leon_jax.tokenizers.vqgan import CONFIG, PARAMS, ImageTokenizer

SCRIPT = "decode_image.py"
FORMAT = "cm3leon_jax.vqgan"  # The network that decode_image.py implements.


def write(folder: epath.PathLike, run: Run) -> dict:
  """Writes the folder `IMAGES` of an export, and its config.json last.

  Returns:
    {"image_tokenizer": {"resolution", "image_tokens", "num_codes", "bytes", "family", "code_dim"}}.
    "resolution" is in pixels. "family" is "" unless the tokenizer is a published one.

  Raises:
    UserError: the stage `train_vqgan` has not run, or its files are damaged, or decode_image.py
      decodes other images. The last check needs torch.
  """
  source, target = run.stages / "vqgan", epath.Path(folder) / IMAGES
  tokenizer = ImageTokenizer.load(source)
  family = ""
  if isinstance(tokenizer.config, PublishedConfig):
    family = tokenizer.config.family
    described = read_json(source / CONFIG)
  else:
    described = _describe(source, tokenizer, run.settings.vocab.text_size)
  target.mkdir(parents=True, exist_ok=True)
  (target / CONFIG).unlink(missing_ok=True)  # A tokenizer without config.json is unfinished.
  with replacing(target / PARAMS) as file, (source / PARAMS).open("rb") as given:
    shutil.copyfileobj(given, file)
  if not family:
    with replacing(target / SCRIPT, "w") as file:
      file.write(importlib.resources.files(__package__).joinpath(SCRIPT).read_text("utf-8"))
  write_json(target / CONFIG, described)
  about = {
    "resolution": tokenizer.config.resolution,
    "image_tokens": tokenizer.config.image_tokens,
    "num_codes": tokenizer.num_codes,
    "bytes": (target / PARAMS).stat().length,
    "family": family,
    "code_dim": tokenizer.config.code_dim,
  }
  return {IMAGES: about}


def _describe(source: epath.Path, tokenizer: ImageTokenizer, token_offset: int) -> dict:
  """Returns config.json of a tokenizer of `cm3leon train_vqgan`, see the module docstring."""
  assert isinstance(tokenizer.config, VQGANConfig)
  is_fsq = tokenizer.config.quantizer == "fsq"
  described = {
    "format": FORMAT,
    "vqgan": dataclasses.asdict(tokenizer.config),
    "num_codes": tokenizer.num_codes,
    "levels": levels_of(tokenizer.num_codes) if is_fsq else (),
    "token_offset": token_offset,
  }
  if importlib.util.find_spec("torch") and (wrong := difference(tokenizer, described)):
    raise UserError(
      f"the image tokenizer in {source} cannot be exported, because {SCRIPT} does not decode the "
      f"same images ({wrong})."
    )
  return described


def difference(tokenizer: ImageTokenizer, described: dict) -> str:
  """Describes how images of decode_image.py differ from those of a tokenizer; "" if they agree.

  Both decode one image from random codes. Differences of one level (of 255) are rounding errors.
  `described` is the content of config.json, see the module docstring.
  """
  import torch

  from cm3leon_jax.export import decode_image

  flat = traverse_util.flatten_dict(jax.device_get(tokenizer.params), sep=".")
  tensors = {name: torch.tensor(array) for name, array in flat.items()}
  codes = np.random.default_rng(0).integers(tokenizer.num_codes, size=tokenizer.config.image_tokens)
  try:
    pixels = decode_image.Tokenizer(described, tensors).decode(torch.tensor(codes))
  except KeyError as error:
    return f"it has no {error}"
  except ValueError as error:
    return str(error)
  with jax.default_matmul_precision("highest"):
    expected = dataclasses.replace(tokenizer, batch_size=1).decode(codes[None])[0]
  apart = int(np.abs(decode_image.to_uint8(pixels).astype(int) - expected).max())
  return f"images differ by {apart} levels of 255" if apart > 1 else ""

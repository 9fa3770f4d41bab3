"""Writes the image tokenizer of an export.

For a tokenizer of `cm3leon train_vqgan`, DIR/image_tokenizer/ has three files: config.json,
params.safetensors from vqgan/ of the run, and decode_image.py, which needs PyTorch, not JAX.
config.json extends the run's file, so `ImageTokenizer.load` can read the folder. decode_image.py
reads `vqgan`, `num_codes`, the `levels` of FSQ, and `token_offset` from config.json. Code c is
token `token_offset + c` of the language model. A published tokenizer keeps the file names of its
release, see `published_files.save`.
"""

# K codes, T codes of an image.

import dataclasses
import importlib.resources
import importlib.util
import shutil

from etils import epath
from flax import traverse_util
import jax
import numpy as np

from cm3leon_jax.config import UserError
from cm3leon_jax.files.atomic import replacing
from cm3leon_jax.files.json_files import write_json
from cm3leon_jax.tokenizers import published_files
from cm3leon_jax.tokenizers.config import VQGANConfig, levels_of
from cm3leon_jax.tokenizers.published import PublishedConfig
from cm3leon_jax.tokenizers.vqgan import CONFIG, PARAMS, ImageTokenizer
from cm3leon_jax.trained.kinds import IMAGES
from cm3leon_jax.trained.run import Run

SCRIPT = "decode_image.py"
FORMAT = "cm3leon_jax.vqgan"  # The network that the script computes.


def write(folder: epath.PathLike, run: Run) -> dict:
  """Writes the folder `IMAGES` of an export; writes config.json last.

  Returns:
    {"image_tokenizer": {"resolution" in pixels, "image_tokens", "num_codes", "bytes", "family" of
      a published tokenizer or "", "code_dim"}}.

  Raises:
    UserError: the stage `train_vqgan` has not run, or its files are damaged. If torch is installed,
      also if decode_image.py does not compute the same network.
  """
  source, target = run.stages / "vqgan", epath.Path(folder) / IMAGES
  tokenizer = ImageTokenizer.load(source)
  family, name = "", PARAMS
  if isinstance(tokenizer.config, PublishedConfig):
    family, name = tokenizer.config.family, published_files.save(target, tokenizer)
  else:
    _write_trained(target, source, tokenizer, run.settings.vocab.text_size)
  about = {
    "resolution": tokenizer.config.resolution,
    "image_tokens": tokenizer.config.image_tokens,
    "num_codes": tokenizer.num_codes,
    "bytes": (target / name).stat().length,
    "family": family,
    "code_dim": tokenizer.config.code_dim,
  }
  return {IMAGES: about}


def _write_trained(
  target: epath.Path, source: epath.Path, tokenizer: ImageTokenizer, token_offset: int
) -> None:
  """Writes a tokenizer of `cm3leon train_vqgan`; copies its weights byte for byte."""
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
      f"the image tokenizer in {source} cannot be exported: {SCRIPT} does not compute its network "
      f"({wrong})."
    )
  target.mkdir(parents=True, exist_ok=True)
  (target / CONFIG).unlink(missing_ok=True)  # An unfinished tokenizer has no config.
  with replacing(target / PARAMS) as file, (source / PARAMS).open("rb") as given:
    shutil.copyfileobj(given, file)
  with replacing(target / SCRIPT, "w") as file:
    file.write(importlib.resources.files(__package__).joinpath(SCRIPT).read_text(encoding="utf-8"))
  write_json(target / CONFIG, described)


def difference(tokenizer: ImageTokenizer, described: dict) -> str:
  """Describes how the decoder of decode_image.py differs from a tokenizer; "" if both agree.

  Both decode one image of random codes. Rounding may change a pixel by one of its 255 levels.
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

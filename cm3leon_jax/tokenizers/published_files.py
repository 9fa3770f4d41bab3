"""Reads published image tokenizers from safetensors, and tokenizers that the package contains."""

from collections.abc import Collection
import dataclasses
import functools
import importlib.resources
import os
import re

from etils import epath
from flax import traverse_util
import jax
import numpy as np
import safetensors

from cm3leon_jax.config.build import build
from cm3leon_jax.config.tokenizers import Family, VQGANConfig
from cm3leon_jax.errors import UserError, short
from cm3leon_jax.files.json_files import read_foreign_json
from cm3leon_jax.models import nnx_params
from cm3leon_jax.tokenizers import published, published_source
from cm3leon_jax.tokenizers.published import FAMILIES, PublishedConfig
from cm3leon_jax.tokenizers.vqgan import CONFIG, PARAMS, ImageTokenizer
from cm3leon_jax.weights import stored_tensors

# Prefixes of tensor names in a whole model: Chameleon and Janus of transformers, Janus' release.
PREFIXES = ("model.vqmodel.", "vqmodel.", "gen_vision_model.")
LEFT = ("loss.", "quantize.codebook_used")  # Prefixes of the tensors that only training needs.
NUM_CODES = 8_192  # Number of codes to expect if a file has no table of codes.
# Family -> side lengths, in pixels, of the images for which its weights are published.
RESOLUTIONS = {
  "amused": (256, 512),
  "chameleon": (512,),
  "llamagen": (256, 384, 512),
  "janus": (384, 256, 512),
}
LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
# Family -> start of a tensor name that the families after it do not have.
MARKS: dict[Family, str] = {
  "amused": "decoder.up_blocks.",
  "llamagen": "decoder.conv_blocks.",
  "janus": "decoder.up.0.attn.",
  "chameleon": "encoder.down.",
}
# Family -> (regular expression for names in `published`, replacement). Chameleon and transformers'
# Janus have the names in `published`, and aMUSEd those of `diffusers.VQModel`. The releases of
# LlamaGen and Janus have the names of LlamaGen's code.
RENAMES: dict[Family, tuple[tuple[str, str], ...]] = {
  "amused": (
    (r"encoder\.down\.", "encoder.down_blocks."),
    (r"decoder\.up\.", "decoder.up_blocks."),
    (r"\.block\.", ".resnets."),
    (r"\.(down|up)sample\.", r".\1samplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
  ),
  "chameleon": (),
  "llamagen": (
    (r"coder\.(down|up)\.", "coder.conv_blocks."),
    (r"\.block\.", ".res."),
    (r"\.mid\.block_1\.", ".mid.0."),
    (r"\.mid\.attn_1\.", ".mid.1."),
    (r"\.mid\.block_2\.", ".mid.2."),
  ),
  "janus": (),
}
# Families that count the levels of the decoder from the lowest.
FROM_LOWEST = ("amused", "llamagen", "janus")
# Families that normalize encodings and codes to length 1 (L2). Reading normalizes the codes. The
# nearest of codes with equal lengths does not depend on the length of the encoding.
UNIT_CODES = ("llamagen", "janus")
TABLE = "quantize.embedding"
# Fields of diffusers' config.json -> (required value, default in diffusers).
FIXED = {
  "_class_name": ("VQModel", "VQModel"),
  "act_fn": ("silu", "silu"),
  "norm_type": ("group", "group"),
  "mid_block_add_attention": (False, True),
}
# Fields of `PublishedConfig` -> fields of diffusers' config.json.
SIZES = {
  "widths": "block_out_channels",
  "blocks": "layers_per_block",
  "latent_channels": "latent_channels",
  "code_dim": "vq_embed_dim",
  "groups": "norm_num_groups",
}


@dataclasses.dataclass(frozen=True)
class Read:
  """Result of `read`.

  Attributes:
    tokenizer: tokenizer for images of the first resolution in `RESOLUTIONS`.
    files: files that contain its tensors.
    num_left: number of tensors in these files that do not belong to the tokenizer.
  """

  tokenizer: ImageTokenizer
  files: tuple[epath.Path, ...]
  num_parameters: int
  num_tensors: int
  num_left: int


def published_name(name: str, config: PublishedConfig) -> str:
  """Returns the name of a parameter in the files of its family.

  With five levels, decoder.up.0.block.1.conv1.kernel is decoder.up_blocks.4.resnets.1.conv1.weight
  in files of `amused`, and decoder.up.0.block.1.conv1.weight in those of `chameleon`.
  """
  layer, _, leaf = name.rpartition(".")
  name = f"{layer}.{LEAVES.get(leaf, leaf)}"
  if config.family in FROM_LOWEST:
    last = len(config.widths) - 1
    name = re.sub(r"(decoder\.up)\.(\d+)", lambda m: f"{m[1]}.{last - int(m[2])}", name)
  for ours, theirs in RENAMES[config.family]:
    name = re.sub(ours, theirs, name)
  return name


@functools.cache
def _shapes(config: PublishedConfig, num_codes: int) -> dict[str, tuple[int, ...]]:
  """Returns parameter name, as in `published` -> shape."""
  state = nnx_params.to_dict(published.structure(config, num_codes)[1])
  return {k: x.shape for k, x in traverse_util.flatten_dict(state, sep=".").items()}


def tensor_shapes(config: PublishedConfig, num_codes: int) -> dict[str, tuple[int, ...]]:
  """Returns published tensor name -> shape. Kernels are [out, in, h, w]."""
  return {
    published_name(name, config): (*shape[:1:-1], *shape[:2]) if len(shape) == 4 else shape
    for name, shape in _shapes(config, num_codes).items()
  }


def from_tensors(tensors: dict[str, np.ndarray], config: PublishedConfig, num_codes: int) -> dict:
  """Converts tensors with published names to fp32 parameters, a pure dict. See `UNIT_CODES`."""
  flat = {}
  for name, shape in _shapes(config, num_codes).items():
    x = np.asarray(tensors[published_name(name, config)], np.float32)
    if config.family in UNIT_CODES and name.startswith(TABLE):
      x = x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
    flat[name] = np.ascontiguousarray(x.transpose(2, 3, 1, 0) if len(shape) == 4 else x)
  return traverse_util.unflatten_dict(flat, sep=".")


def find_family(names: Collection[str], source: epath.PathLike) -> Family:
  """Returns the family of tensor names. Raises UserError if they have no mark of `MARKS`."""
  for family, mark in MARKS.items():
    if any(name.startswith(mark) for name in names):
      return family
  raise UserError(
    f"{source} has no tensors of a supported image tokenizer ({', '.join(FAMILIES)}): name the "
    "file or folder with its weights."
  )


def diffusers_config(path: epath.Path) -> PublishedConfig:
  """Reads the sizes of an aMUSEd tokenizer from diffusers' config.json.

  Without this file, returns the sizes of the published aMUSEd.

  Raises:
    UserError: the file is damaged, or describes another network.
  """
  if not path.exists():
    return FAMILIES["amused"]
  stored = read_foreign_json(path, {})
  for name, (value, default) in FIXED.items():
    if (result := stored.get(name, default)) != value:
      raise UserError(
        f"{path}: {name} is {short(result)}; for --family=amused it must be {value!r}."
      )
  sizes = {ours: stored[name] for ours, name in SIZES.items() if stored.get(name) is not None}
  if "latent_channels" in sizes:
    sizes.setdefault("code_dim", sizes["latent_channels"])
  try:
    return build(PublishedConfig, dataclasses.asdict(FAMILIES["amused"]) | sizes)
  except UserError as error:
    raise UserError(f"{path} does not describe a supported VQModel ({error})") from error


def _check(found: dict, config: PublishedConfig, num_codes: int, source: epath.PathLike) -> None:
  """Raises UserError, which names the tensor, if a tensor is missing, surplus or of another shape.

  `found` is the result of `published_source.read_headers`.
  """
  expected, of_family = tensor_shapes(config, num_codes), f"--family={config.family}"
  if missing := [name for name in expected if name not in found]:
    hint = "name the weights of this tokenizer, or another --family."
    if not any(name.startswith("decoder.") for name in found):
      hint = (
        "it contains no decoder, as in Chameleon of transformers: take the release's own file of "
        "the tokenizer, vqgan.ckpt, as safetensors."
      )
    raise UserError(
      f"{source} has no tensor '{missing[0]}' ({len(missing)} of {len(expected)} tensors of "
      f"{of_family} are missing): {hint}"
    )
  if surplus := sorted(set(found) - set(expected)):
    raise UserError(
      f"{source} has {len(surplus)} tensors, such as '{surplus[0]}', that {of_family} does not "
      "have: name a file with only this tokenizer, or another --family."
    )
  for name, shape in expected.items():
    if found[name][1] != shape:
      raise UserError(
        f"{source}: tensor '{name}' has shape {list(found[name][1])}; for {of_family} it must be "
        f"{list(shape)}."
      )


def read(
  source: epath.PathLike, family: Family | None = None, sizes: PublishedConfig | None = None
) -> Read:
  """Reads a published tokenizer of any floating-point dtype as fp32.

  Args:
    source: see `published_source.find_files`. For files of diffusers, config.json in the same
      folder gives the sizes.
    family: key of `FAMILIES`. None: `find_family`.
    sizes: its sizes; None: those of the published weights.

  Raises:
    UserError: a file is absent, damaged or a pickle; or a tensor is missing, surplus, of another
      shape, or not finite.
  """
  files = published_source.find_files(source)
  every = published_source.read_headers(files)
  prefix = next((p for p in PREFIXES if any(name.startswith(p) for name in every)), "")
  result = {
    name.removeprefix(prefix): value
    for name, value in every.items()
    if name.startswith(prefix) and not name.removeprefix(prefix).startswith(LEFT)
  }
  family = family or find_family(result, source)
  config = sizes or FAMILIES[family]
  if family == "amused":
    config = diffusers_config(files[0].parent / CONFIG)
  shape = result[table][1] if (table := f"{TABLE}.weight") in result else ()
  num_codes = shape[0] if shape and shape[0] else NUM_CODES
  _check(result, config, num_codes, source)
  tensors: dict[str, np.ndarray] = {}
  holders = sorted({path for path, _ in result.values()})
  for path in holders:
    with safetensors.safe_open(os.fspath(path), framework="np") as file:
      tensors |= {
        name: np.asarray(file.get_tensor(prefix + name), np.float32)
        for name, (holder, _) in result.items()
        if holder == path
      }
  if bad := stored_tensors.not_finite(tensors):
    raise UserError(f"{source}: tensor '{bad}' has values that are not finite.")
  params = from_tensors(tensors, config, num_codes)
  counts = sum(x.size for x in tensors.values()), len(tensors), len(every) - len(result)
  tokenizer = ImageTokenizer(config, num_codes, params, config.batch_size)
  return Read(tokenizer, tuple(holders), *counts)


def is_own(source: epath.PathLike) -> bool:
  """Returns whether a folder is the image_tokenizer/ of an export or the vqgan/ of a run."""
  path = epath.Path(source) / CONFIG
  stored = read_foreign_json(path, {}) if path.exists() else {}
  return "vqgan" in stored or published.SECTION in stored


def read_own(source: epath.PathLike) -> Read:
  """Reads a tokenizer for which `is_own` is true.

  Raises:
    UserError: a file is absent or damaged.
  """
  tokenizer = ImageTokenizer.load(source)
  arrays = jax.tree.leaves(tokenizer.params)
  sizes = sum(x.size for x in arrays), len(arrays), 0
  return Read(tokenizer, (epath.Path(source) / PARAMS,), *sizes)


def read_installed(name: str, num_codes: int, vqgan: VQGANConfig) -> ImageTokenizer:
  """Reads a tokenizer of the package, `vqgan.source`. Raises UserError as `fit` does."""
  return fit(ImageTokenizer.load(installed_folder(name)), num_codes, vqgan)


def installed_folder(name: str) -> epath.Path:
  """Returns the folder of a tokenizer of the package."""
  return epath.Path(str(importlib.resources.files("cm3leon_jax"))) / "assets/tokenizers" / name


def fit(tokenizer: ImageTokenizer, num_codes: int, vqgan: VQGANConfig) -> ImageTokenizer:
  """Returns an imported tokenizer, set to the resolution in a config.

  `num_codes` is `vocab.image_size` of the config. Only `resolution` and `downsample` of `vqgan`
  are read. A tokenizer with `local_codes` fits every resolution.

  Raises:
    UserError: the codebook or the grid of codes differs from the config.
  """
  config = tokenizer.config
  sides: tuple[int, ...] = (config.resolution,)
  if isinstance(config, VQGANConfig):
    sides += (vqgan.resolution,) * config.local_codes
  elif config.resolution in RESOLUTIONS[config.family]:
    sides = RESOLUTIONS[config.family]
  side = vqgan.resolution if vqgan.resolution in sides else sides[0]
  needed: dict[str, tuple] = {
    "vocab.image_size": (num_codes, tokenizer.num_codes),
    "vqgan.resolution": (vqgan.resolution, side),
    "vqgan.downsample": (vqgan.downsample, config.downsample),
  }
  if wrong := {name: new for name, (old, new) in needed.items() if old != new}:
    flags = " ".join(f"--config.{name}={value}" for name, value in wrong.items())
    raise UserError(f"the image tokenizer has other codes than the config: add the flags {flags}")
  config = dataclasses.replace(config, resolution=vqgan.resolution)
  if isinstance(config, VQGANConfig):
    return dataclasses.replace(tokenizer, config=config)
  return dataclasses.replace(tokenizer, config=config, batch_size=config.batch_size)

"""Reads published image tokenizers from safetensors, and writes them with published names."""

import dataclasses
import functools
import os
import re

from etils import epath
from flax import traverse_util
import jax
import numpy as np
import safetensors
from safetensors import numpy as safetensors_numpy

from cm3leon_jax import parameters
from cm3leon_jax.config import UserError, build, short
from cm3leon_jax.files.atomic import replacing
from cm3leon_jax.files.json_files import read_foreign_json, write_json
from cm3leon_jax.tokenizers import published, published_source
from cm3leon_jax.tokenizers.config import Family, VQGANConfig
from cm3leon_jax.tokenizers.published import FAMILIES, PublishedConfig
from cm3leon_jax.tokenizers.published_source import DIFFUSERS, TRANSFORMERS
from cm3leon_jax.tokenizers.vqgan import CONFIG, PARAMS, ImageTokenizer

PREFIXES = ("model.vqmodel.", "vqmodel.")  # Prefixes of tensor names in a whole Chameleon model.
LEFT = "loss."  # Prefix of the tensors that only training needs.
NUM_CODES = 8_192  # Number of codes in the published weights of all families.
# Family -> side lengths, in pixels, of the images for which its weights are published.
RESOLUTIONS = {"amused": (256, 512), "taming_gumbel_f8": (256,), "chameleon": (512,)}
LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
# Regular expression for names in `published` -> replacement for `diffusers.VQModel`.
RENAMES = (
  (r"encoder\.down\.", "encoder.down_blocks."),
  (r"\.block\.", ".resnets."),
  (r"\.(down|up)sample\.", r".\1samplers.0."),
  (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
  (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
  (r"\.norm_out\.", ".conv_norm_out."),
  (r"\.nin_shortcut\.", ".conv_shortcut."),
)
# Fields of diffusers' config.json -> (required value, default in diffusers).
FIXED = {
  "_class_name": ("VQModel", "VQModel"),
  "act_fn": ("silu", "silu"),
  "in_channels": (3, 3),
  "out_channels": (3, 3),
  "norm_type": ("group", "group"),
  "mid_block_add_attention": (False, True),
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
  in files of `amused`, and decoder.up.0.block.1.conv1.weight in files of other families.
  """
  layer, _, leaf = name.rpartition(".")
  name = f"{layer}.{LEAVES.get(leaf, leaf)}"
  if config.family != "amused":
    return name
  last = len(config.widths) - 1  # diffusers counts decoder levels from the lowest.
  name = re.sub(r"decoder\.up\.(\d+)", lambda m: f"decoder.up_blocks.{last - int(m[1])}", name)
  for ours, theirs in RENAMES:
    name = re.sub(ours, theirs, name)
  return name


@functools.cache
def _shapes(config: PublishedConfig, num_codes: int) -> dict[str, tuple[int, ...]]:
  """Returns parameter name, as in `published` -> shape."""
  state = parameters.to_dict(published.structure(config, num_codes)[1])
  return {k: x.shape for k, x in traverse_util.flatten_dict(state, sep=".").items()}


def tensor_shapes(config: PublishedConfig, num_codes: int) -> dict[str, tuple[int, ...]]:
  """Returns published tensor name -> shape. Kernels are [out, in, h, w]."""
  return {
    published_name(name, config): (*shape[:1:-1], *shape[:2]) if len(shape) == 4 else shape
    for name, shape in _shapes(config, num_codes).items()
  }


def to_tensors(tokenizer: ImageTokenizer) -> dict[str, np.ndarray]:
  """Returns the parameters of a published tokenizer under their published names."""
  config = tokenizer.config
  assert isinstance(config, PublishedConfig)
  flat = traverse_util.flatten_dict(jax.device_get(tokenizer.params), sep=".")
  return {
    published_name(name, config): np.ascontiguousarray(
      x.transpose(3, 2, 0, 1) if x.ndim == 4 else x
    )
    for name, x in flat.items()
  }


def from_tensors(tensors: dict[str, np.ndarray], config: PublishedConfig, num_codes: int) -> dict:
  """Inverts `to_tensors`: returns fp32 parameters as a pure dict."""
  flat = {}
  for name, shape in _shapes(config, num_codes).items():
    x = np.asarray(tensors[published_name(name, config)], np.float32)
    flat[name] = np.ascontiguousarray(x.transpose(2, 3, 1, 0) if len(shape) == 4 else x)
  return traverse_util.unflatten_dict(flat, sep=".")


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
    if (found := stored.get(name, default)) != value:
      raise UserError(
        f"{path}: {name} is {short(found)}; for --family=amused it must be {value!r}."
      )
  needed = ("block_out_channels", "layers_per_block", "latent_channels")
  if absent := [name for name in needed if stored.get(name) is None]:
    raise UserError(
      f"{path} has no field {absent[0]}, which diffusers.VQModel needs: take config.json from the "
      "folder in which the weights are published."
    )
  sizes = {
    "widths": stored.get("block_out_channels"),
    "blocks": stored.get("layers_per_block"),
    "latent_channels": stored.get("latent_channels"),
    "code_dim": stored.get("vq_embed_dim") or stored.get("latent_channels"),
    "groups": stored.get("norm_num_groups", 32),
  }
  try:
    return build(PublishedConfig, dataclasses.asdict(FAMILIES["amused"]) | sizes)
  except UserError as error:
    raise UserError(f"{path} does not describe a supported VQModel ({error})") from error


def _check(found: dict, config: PublishedConfig, num_codes: int, source: epath.PathLike) -> None:
  """Raises UserError, which names the tensor, if a tensor is missing, surplus or of another shape.

  `found` is the result of `published_source.read_headers`.
  """
  expected = tensor_shapes(config, num_codes)
  if missing := [name for name in expected if name not in found]:
    names = {family: tensor_shapes(other, NUM_CODES).keys() for family, other in FAMILIES.items()}
    others = [f for f in FAMILIES if f != config.family and names[f] <= found.keys()]
    if others:
      hint = f"its tensors have the names of --family={others[0]}."
    elif not any(name.startswith("decoder.") for name in found):
      hint = (
        "it contains no decoder, as in Chameleon of transformers: take the release's own file of "
        "the tokenizer, vqgan.ckpt, as safetensors."
      )
    else:
      hint = "name the weights of this tokenizer, or another --family."
    raise UserError(
      f"{source} has no tensor '{missing[0]}' ({len(missing)} of {len(expected)} tensors of "
      f"--family={config.family} are missing): {hint}"
    )
  if surplus := sorted(set(found) - set(expected)):
    raise UserError(
      f"{source} has {len(surplus)} tensors, such as '{surplus[0]}', that --family={config.family} "
      "does not have: name a file with only this tokenizer, or another --family."
    )
  for name, shape in expected.items():
    if found[name][1] != shape:
      raise UserError(
        f"{source}: tensor '{name}' has shape {list(found[name][1])}; for --family={config.family} "
        f"it must be {list(shape)}."
      )


def read(source: epath.PathLike, family: Family) -> Read:
  """Reads a published tokenizer of any floating-point dtype as fp32.

  Args:
    source: see `published_source.find_files`. For files of diffusers, config.json in the same
      folder gives the sizes.
    family: key of `FAMILIES`.

  Raises:
    UserError: a file is absent, damaged, a pickle, or another kind of model; or a tensor is
      missing, surplus, of another shape, or not finite.
  """
  files = published_source.find_files(source)
  every = published_source.read_headers(files)
  published_source.check_kind(files[0].parent, every, source)
  config = FAMILIES[family]
  if family == "amused":
    config = diffusers_config(files[0].parent / CONFIG)
  prefix = next((p for p in PREFIXES if any(name.startswith(p) for name in every)), "")
  found = {
    name.removeprefix(prefix): value
    for name, value in every.items()
    if name.startswith(prefix) and not name.startswith(prefix + LEFT)
  }
  table = "quantize.embed.weight" if config.gumbel else "quantize.embedding.weight"
  shape = found[table][1] if table in found else ()
  num_codes = shape[0] if shape and shape[0] else NUM_CODES
  _check(found, config, num_codes, source)
  tensors: dict[str, np.ndarray] = {}
  holders = sorted({path for path, _ in found.values()})
  for path in holders:
    with safetensors.safe_open(os.fspath(path), framework="np") as file:
      tensors |= {
        name: np.asarray(file.get_tensor(prefix + name), np.float32)
        for name, (holder, _) in found.items()
        if holder == path
      }
  if bad := parameters.not_finite(tensors):
    raise UserError(f"{source}: tensor '{bad}' has values that are not finite.")
  params = from_tensors(tensors, config, num_codes)
  sizes = sum(x.size for x in tensors.values()), len(tensors), len(every) - len(found)
  tokenizer = ImageTokenizer(config, num_codes, params, config.batch_size)
  return Read(tokenizer, tuple(holders), *sizes)


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


def fit(tokenizer: ImageTokenizer, num_codes: int, vqgan: VQGANConfig) -> ImageTokenizer:
  """Returns an imported tokenizer, set to the resolution in a config.

  `num_codes` is `vocab.image_size` of the config. Only `resolution`, `downsample` and `code_colors`
  of `vqgan` are read.

  Raises:
    UserError: the codebook, its colors or the grid of codes differ from the config.
  """
  config = tokenizer.config
  colors = config.code_colors if isinstance(config, VQGANConfig) else 0
  sides: tuple[int, ...] = (config.resolution,)
  maker = "the tokenizer"
  if isinstance(config, PublishedConfig):
    sides, maker = RESOLUTIONS[config.family], f"--family={config.family}"
  if tokenizer.num_codes != num_codes:
    raise UserError(
      f"config.vocab.image_size is {num_codes}; the codebook has {tokenizer.num_codes} codes: set "
      f"config.vocab.image_size={tokenizer.num_codes}."
    )
  if vqgan.downsample != config.downsample or vqgan.resolution not in sides:
    grids = " or ".join(f"{(s // config.downsample) ** 2:,} codes of {s}x{s} pixels" for s in sides)
    raise UserError(
      f"config.vqgan.resolution is {vqgan.resolution} and config.vqgan.downsample "
      f"{vqgan.downsample}, {vqgan.image_tokens:,} codes per image; {maker} makes {grids}: set "
      f"config.vqgan.resolution={sides[0]}, config.vqgan.downsample={config.downsample}."
    )
  if colors != vqgan.code_colors:
    fields = f"config.vqgan.quantizer={getattr(config, 'quantizer', '')}"
    fields += f", config.vqgan.num_colors={colors}" if colors else ""
    raise UserError(
      f"config.vqgan has codes of {vqgan.code_colors} colors, and {maker} of {colors} (0: no pairs "
      f"of a shape and a color): set {fields}."
    )
  if isinstance(config, VQGANConfig):
    return tokenizer
  config = dataclasses.replace(config, resolution=vqgan.resolution)
  return dataclasses.replace(tokenizer, config=config, batch_size=config.batch_size)


def save_diffusers(folder: epath.PathLike, tokenizer: ImageTokenizer) -> None:
  """Writes an aMUSEd tokenizer for `diffusers.VQModel.from_pretrained`.

  Writes config.json last, because diffusers loads nothing without this file. The network reads and
  writes pixels in [0, 1].

  Raises:
    UserError: diffusers has no format for the tokenizer.
  """
  config = tokenizer.config
  if not isinstance(config, PublishedConfig) or config.family != "amused":
    name = getattr(config, "family", "trained by cm3leon train_vqgan")
    raise UserError(f"the image tokenizer is {name}; diffusers.VQModel reads only --family=amused.")
  folder, levels = epath.Path(folder), len(config.widths)
  (folder / CONFIG).unlink(missing_ok=True)
  with replacing(folder / DIFFUSERS) as file:
    file.write(safetensors_numpy.save(to_tensors(tokenizer), metadata={"format": "pt"}))
  sizes = {
    "block_out_channels": config.widths,
    "layers_per_block": config.blocks,
    "latent_channels": config.latent_channels,
    "vq_embed_dim": config.code_dim,
    "norm_num_groups": config.groups,
    "num_vq_embeddings": tokenizer.num_codes,
    "sample_size": config.resolution,
    "down_block_types": ["DownEncoderBlock2D"] * levels,
    "up_block_types": ["UpDecoderBlock2D"] * levels,
    "lookup_from_codebook": True,
    "force_upcast": True,
  }
  write_json(folder / CONFIG, {name: value for name, (value, _) in FIXED.items()} | sizes)


def save(folder: epath.PathLike, tokenizer: ImageTokenizer) -> str:
  """Writes a published tokenizer with the names of its release, so that `read` can read it.

  Uses `save_diffusers` for `amused`. Writes config.json last. Returns the name of the file with the
  tensors.
  """
  folder, config = epath.Path(folder), tokenizer.config
  assert isinstance(config, PublishedConfig)
  if config.family == "amused":
    save_diffusers(folder, tokenizer)
    return DIFFUSERS
  (folder / CONFIG).unlink(missing_ok=True)
  with replacing(folder / TRANSFORMERS) as file:
    file.write(safetensors_numpy.save(to_tensors(tokenizer), metadata={"format": "pt"}))
  write_json(folder / CONFIG, dataclasses.asdict(config) | {"num_codes": tokenizer.num_codes})
  return TRANSFORMERS

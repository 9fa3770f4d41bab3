"""Imports ChameleonForConditionalGeneration, Chameleon's and Anole's class, as family `chameleon`.

The layout is that of transformers. Token tables are renumbered, see `chameleon_ids`; all else stays
as it is, in its own dtype. The folder's small files and the tensors of its image encoder are kept,
so that `cm3leon export` can write the same layout again.
"""

# V ids of the vocabulary, D width.

from collections.abc import Iterator, Sequence
import dataclasses
import functools

from etils import epath
from jaxtyping import Int32
import numpy as np

from cm3leon_jax.config.build import build
from cm3leon_jax.config.model import ROPE_BASE, ModelConfig
from cm3leon_jax.errors import UserError, short
from cm3leon_jax.files.json_files import FOREIGN_BYTES, check_foreign, write_json
from cm3leon_jax.importing.source import CONFIG, OWN, SourceCheckpoint
from cm3leon_jax.run.initial import IDS, VQMODEL
from cm3leon_jax.run.source import ABOUT, DIGESTS, IMAGES
from cm3leon_jax.tokenizers import published_files
from cm3leon_jax.tokenizers.published import FAMILIES, PublishedConfig
from cm3leon_jax.weights import layouts, tensor_files
from cm3leon_jax.weights.stored_tensors import FLOATS, StoredTensors
from cm3leon_jax.weights.tensor_files import DTYPES, Tensor

ARCHITECTURE = "ChameleonForConditionalGeneration"
# Fields of config.json that must be absent or have this value.
REQUIRED = {"hidden_act": "silu", "rms_norm_eps": 1e-5, "attention_bias": False, "mlp_bias": False}
REQUIRED["tie_word_embeddings"] = False
# The other fields that may have a value: read here, without effect, or for training alone.
KNOWN = {
  *REQUIRED, "_name_or_path", "architectures", "attention_dropout", "dtype", "hidden_size",
  "initializer_range", "intermediate_size", "max_position_embeddings", "model_parallel_size",
  "model_type", "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "return_dict",
  "rope_parameters", "rope_scaling", "rope_theta", "swin_norm", "torch_dtype",
  "transformers_version", "use_cache", "vocab_size", "vocabulary_map", "vq_config", OWN,
}  # fmt: skip
# Fields of vq_config -> the only value of the published network.
FIXED = {"double_latent": False, "in_channels": 3, "attn_type": "vanilla", "attn_resolutions": None}
PREFIX = "model.vqmodel."
VQGAN = "vqgan.safetensors"
BLOCK = 4_096  # Rows of a table that are in memory in fp32.
NOT_KEPT = (ABOUT, DIGESTS, tensor_files.INDEX)
SUFFIXES = (".json", ".jinja", ".md", ".model", ".txt", "")  # "": LICENSE.


@dataclasses.dataclass(frozen=True)
class Published:
  """Parts of a folder beside decoder and text tokenizer.

  Attributes:
    theirs: the source's id of each of our ids.
    images: the image tokenizer.
    encoder: tensors of the image tokenizer in the folder, which often lack its decoder.
  """

  theirs: Int32[np.ndarray, " V"]
  images: published_files.Read
  encoder: Sequence[Tensor]


def model_fields(source: SourceCheckpoint) -> dict:
  """Returns the fields of `config.model` that describe the decoder of a checkpoint.

  Raises:
    UserError: the checkpoint is of another class, or may differ from the family `chameleon`.
  """
  path = source.folder / CONFIG
  named = source.part("architectures", list) or [ARCHITECTURE]
  if "z_loss_weight" in source.described or any("XLLMX" in str(name) for name in named):
    raise UserError(
      f"{path} is of Lumina-mGPT, whose images contain tokens for their size and line ends, which "
      "cannot be imported; Chameleon and Anole can."
    )
  if named != [ARCHITECTURE]:
    raise UserError(f"{path}: architectures is {short(named)}; it must be ['{ARCHITECTURE}'].")
  source.require(REQUIRED)
  for name, value in source.described.items():
    if value and name not in KNOWN and not name.endswith("_token_id"):
      raise UserError(
        f"{path} has the field '{name}', which {ARCHITECTURE} does not have: if the decoder does "
        "not depend on it, remove the field."
      )
  heads, base = source.size("num_attention_heads", 32), source.rope_base()
  groups = source.key_heads(heads)
  return {
    "family": "chameleon",
    "num_layers": source.size("num_hidden_layers", 32),
    "width": source.size("hidden_size", 4_096),
    "num_heads": heads,
    "num_kv_heads": 0 if groups == heads else groups,
    "head_size": 0,
    "rope_base": 0.0 if base == ROPE_BASE else base,
    "mlp_width": source.size("intermediate_size", 11_008),
    "swin_norm": bool(source.described.get("swin_norm")),
  }


def image_sizes(source: SourceCheckpoint) -> PublishedConfig:
  """Returns the sizes of the image tokenizer. Raises UserError if it is another network."""
  path, given = source.folder / CONFIG, source.part("vq_config", dict)
  for name, value in FIXED.items():
    if (result := given.get(name, value)) != value and (result or value):
      raise UserError(f"{path}: vq_config.{name} is {short(result)}; it must be {value!r}.")
  sizes = dataclasses.asdict(FAMILIES["chameleon"])
  names = {"latent_channels": "latent_channels", "code_dim": "embed_dim"}
  names |= {"blocks": "num_res_blocks", "resolution": "resolution"}
  sizes |= {ours: given[name] for ours, name in names.items() if name in given}
  try:
    base, multipliers = given.get("base_channels", 128), given.get("channel_multiplier")
    sizes["widths"] = [base * m for m in multipliers or (1, 1, 2, 2, 4)]
    return build(PublishedConfig, sizes)
  except (TypeError, UserError) as error:
    raise UserError(f"{path}: vq_config does not describe Chameleon's ({error})") from error


def read_images(source: SourceCheckpoint) -> published_files.Read:
  """Reads the image tokenizer of a folder. A release's `VQGAN` in the folder adds the decoder.

  Raises:
    UserError: the folder has no image decoder, or the one of another tokenizer.
  """
  folder, sizes = source.folder, image_sizes(source)
  kept = [name for name in source.tensors.names if name.startswith(PREFIX)]
  if any(name.startswith(f"{PREFIX}decoder.") for name in kept):
    return published_files.read(folder, "chameleon", sizes)
  if published_files.is_own(folder / IMAGES):  # An export of this project.
    return published_files.read_own(folder / IMAGES)
  if not (folder / VQGAN).exists():
    raise UserError(
      f"{folder} has no image decoder, which transformers' conversion leaves out: convert "
      "tokenizer/vqgan.ckpt of the release to safetensors, as docs/weights.md shows, and add it as "
      f"{folder / VQGAN}."
    )
  result = published_files.read(folder / VQGAN, "chameleon", sizes)
  others = StoredTensors(folder, [VQGAN])
  for name in kept:
    x, inner = source.tensors.read(name), name.removeprefix(PREFIX)
    dtype = FLOATS[source.tensors.dtype(name)]
    if inner not in others or not np.array_equal(others.read(inner).astype(dtype), x):
      raise UserError(
        f"{folder / VQGAN} is of another image tokenizer than {folder}: '{inner}' differs."
      )
  return result


def tensors(
  source: SourceCheckpoint, config: ModelConfig, theirs: Int32[np.ndarray, " V"]
) -> tuple[list[Tensor], list[Tensor]]:
  """Returns the tensors of the decoder, in our layout, and those of the image tokenizer.

  Reads all tensors once, so that nothing is written if a value is not finite.

  Raises:
    UserError: a tensor is absent, surplus, of another shape or not finite.
  """
  layout, shapes = layouts.layout_of(config), layouts.shapes_of(config)
  tables = [f"{layout.tables[name]}.weight" for name in ("embed", "head")]
  encoder = [name for name in source.tensors.names if name.startswith(PREFIX)]
  source.check_names({*shapes, *encoder})
  for name, shape in shapes.items():
    source.tensors.check_shape(name, shape)
  for name in source.tensors.names:
    for _ in _blocks(source.tensors, name):
      pass  # Reading checks the values.

  def tensor(name: str) -> Tensor:
    result = source.tensors.tensor(name)
    if name not in tables:
      return result
    make = functools.partial(_renumbered, source.tensors, name, result.dtype, theirs)
    return dataclasses.replace(result, make=make)

  return [tensor(name) for name in shapes], [*map(source.tensors.tensor, encoder)]


def _blocks(stored: StoredTensors, name: str) -> Iterator[tuple[slice, np.ndarray]]:
  """Reads a tensor in blocks of rows."""
  for start in range(0, stored.shape(name)[0], BLOCK):
    part = slice(start, start + BLOCK)
    yield part, stored.read(name, part)


def _renumbered(
  stored: StoredTensors, name: str, dtype: str, theirs: Int32[np.ndarray, " V"]
) -> np.ndarray:
  """Returns the rows of a table in the order of our ids, in its own dtype."""
  result, ours = np.empty(stored.shape(name), DTYPES[dtype][1]), np.argsort(theirs)
  for part, rows in _blocks(stored, name):
    result[ours[part]] = rows
  return result


def keep(folder: epath.Path, source: SourceCheckpoint, published: Published) -> None:
  """Writes the small files of the source, its tensors for images and its ids to a folder."""
  folder.mkdir(parents=True, exist_ok=True)
  for path in sorted(source.folder.iterdir()):
    if path.is_dir() or path.name in NOT_KEPT or path.suffix not in SUFFIXES:
      continue
    check_foreign(path, FOREIGN_BYTES)
    (folder / path.name).write_bytes(path.read_bytes())
  write_json(folder / IDS, {"theirs": published.theirs.tolist()})
  tensor_files.write_file(folder / VQMODEL, published.encoder)

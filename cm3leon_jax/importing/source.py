"""Opens a checkpoint in the Hugging Face layout in a local folder, and checks its content."""

from collections.abc import Collection, Mapping
import dataclasses
from typing import Any

from etils import epath

from cm3leon_jax.config.model import ROPE_BASE
from cm3leon_jax.errors import UserError, short
from cm3leon_jax.files.digests import digest
from cm3leon_jax.files.json_files import FOREIGN_BYTES, NAMES, check_foreign, read_foreign_json
from cm3leon_jax.run import exported
from cm3leon_jax.run.source import has_published_ids
from cm3leon_jax.tokenizers.text import TOKENIZER
from cm3leon_jax.weights import stored_tensors
from cm3leon_jax.weights.layouts import LAYOUTS
from cm3leon_jax.weights.stored_tensors import StoredTensors
from cm3leon_jax.weights.tensor_files import INDEX, WEIGHTS

CONFIG = "config.json"
# The values of model_type of the published decoders that can be imported.
QWEN3 = "qwen3"
CHAMELEON = "chameleon"
OWN = "cm3leon"  # Field of config.json in exports of `cm3leon export`.


@dataclasses.dataclass(frozen=True)
class SourceCheckpoint:
  """Checkpoint to import. `described` is the content of its config.json."""

  folder: epath.Path
  described: Mapping[str, Any]
  tensors: StoredTensors

  @property
  def is_own(self) -> bool:
    """Whether `cm3leon export` wrote the checkpoint, so that it has this project's vocabulary."""
    return OWN in self.described and not has_published_ids(self.described)

  def size(self, name: str, default: int) -> int:
    """Returns a positive whole number from config.json. Raises UserError for other values."""
    result = self.described.get(name)
    value = default if result is None else result
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
      raise UserError(
        f"{self.folder / CONFIG}: {name} is {short(value)}; it must be a positive whole number."
      )
    return value

  def part(self, name: str, kind: type) -> Any:
    """Returns an object or list of config.json, or an empty one. Raises UserError for others."""
    result = self.described.get(name)
    if result is None:
      return kind()
    if not isinstance(result, kind):
      raise UserError(
        f"{self.folder / CONFIG}: {name} is {short(result)}; it must be of type {NAMES[kind]}."
      )
    return result

  def require(self, values: Mapping[str, Any]) -> None:
    """Raises UserError if config.json has another value than `values` for one of these fields."""
    for name, value in values.items():
      if (result := self.described.get(name)) not in (value, None):
        raise UserError(
          f"{self.folder / CONFIG}: {name} is {short(result)}, but only {value!r} can be imported "
          "exactly."
        )

  def key_heads(self, heads: int) -> int:
    """Returns the number of key and value heads. Raises UserError if it does not divide `heads`."""
    result = self.size("num_key_value_heads", 32)
    if heads % result:
      raise UserError(
        f"{self.folder / CONFIG}: num_key_value_heads ({result}) must divide num_attention_heads "
        f"({heads})."
      )
    return result

  def rope_base(self) -> float:
    """Returns the base of the rotary wavelengths. Raises UserError if positions are scaled."""
    path = self.folder / CONFIG
    rope = {**self.part("rope_scaling", dict), **self.part("rope_parameters", dict)}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
      raise UserError(
        f"{path}: rotary positions of type '{kind}', or over a part of a head, cannot be imported "
        "exactly; only the type 'default' over whole heads is supported."
      )
    given = (part.get("rope_theta") for part in (rope, self.described))
    base = next((value for value in given if value is not None), ROPE_BASE)
    if not isinstance(base, int | float) or isinstance(base, bool) or not 0 < base <= 1e12:
      raise UserError(f"{path}: rope_theta is {short(base)}; it must be positive and at most 1e12.")
    return float(base)

  def check_names(self, expected: Collection[str]) -> None:
    """Raises UserError if the checkpoint has tensors that are not in `expected`."""
    surplus = [name for name in self.tensors.names if name not in expected]
    if surplus:
      raise UserError(
        f"{self.folder} has the tensor '{surplus[0]}', which does not belong to the model in "
        f"{CONFIG}: this checkpoint cannot be imported without losing it."
      )

  def digests(self) -> dict[str, str]:
    """Maps each imported file to the first 16 hex digits of its SHA-256, or to "" if absent."""
    result = {
      "weights": stored_tensors.digest_of(self.folder),
      "config": digest(self.folder / CONFIG),
      "tokenizer": digest(self.folder / TOKENIZER),
    }
    return {name: (sha256 or "")[:16] for name, sha256 in result.items()}


def open_source(source: str) -> SourceCheckpoint:
  """Opens the checkpoint in a folder.

  Raises:
    UserError: the folder contains no checkpoint that can be read safely and imported exactly.
  """
  folder = epath.Path(source)
  if not (folder / CONFIG).exists():
    raise UserError(
      f"--source is {source}; it must be a local folder with {CONFIG} and {WEIGHTS}, as written by "
      "`cm3leon export` or by save_pretrained of transformers, because nothing is downloaded."
    )
  described = read_foreign_json(folder / CONFIG, {})
  check_foreign(folder / TOKENIZER, FOREIGN_BYTES)
  own = [layout.model_type for layout in LAYOUTS.values()] if OWN in described else []
  if (result := described.get("model_type")) not in (QWEN3, CHAMELEON, *own):
    raise UserError(
      f"{folder / CONFIG}: model_type is {short(result)}; it must be '{QWEN3}' or '{CHAMELEON}', "
      "the decoders of config.model.family 'modern' and 'chameleon', unless the folder is an "
      "export of this project."
    )
  if not stored_tensors.are_in(folder):
    raise UserError(
      f"{folder} has no weights; it must contain {WEIGHTS}, or {INDEX} and its files (pickles are "
      "never read)."
    )
  exported.check(folder)
  return SourceCheckpoint(folder, described, StoredTensors(folder))

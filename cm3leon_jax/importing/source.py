"""Opens a checkpoint in the Hugging Face layout in a local folder, and checks its content."""

from collections.abc import Collection, Mapping
import dataclasses
from typing import Any

from etils import epath

from cm3leon_jax.errors import UserError, short
from cm3leon_jax.files.digests import digest
from cm3leon_jax.files.json_files import FOREIGN_BYTES, NAMES, check_foreign, read_foreign_json
from cm3leon_jax.run import exported
from cm3leon_jax.tokenizers.text import TOKENIZER
from cm3leon_jax.weights import stored_tensors
from cm3leon_jax.weights.layouts import LAYOUTS
from cm3leon_jax.weights.stored_tensors import StoredTensors
from cm3leon_jax.weights.tensor_files import INDEX, WEIGHTS

CONFIG = "config.json"
QWEN3 = "qwen3"  # The model_type of the published decoders that can be imported.
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
    return OWN in self.described

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
  if (result := described.get("model_type")) not in (QWEN3, *own):
    raise UserError(
      f"{folder / CONFIG}: model_type is {short(result)}; it must be '{QWEN3}', "
      "the decoder of config.model.family 'modern', unless the folder is an export of this "
      "project."
    )
  if not stored_tensors.are_in(folder):
    raise UserError(
      f"{folder} has no weights; it must contain {WEIGHTS}, or {INDEX} and its files (pickles are "
      "never read)."
    )
  exported.check(folder)
  return SourceCheckpoint(folder, described, StoredTensors(folder))

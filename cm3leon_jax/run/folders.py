"""Reads the settings of a run, and detects the format of an export. Does not import JAX."""

from etils import epath

from cm3leon_jax.config.settings import Settings, settings_from_stored
from cm3leon_jax.errors import UserError
from cm3leon_jax.files.json_files import read_foreign_json, read_json

ABOUT = "export.json"  # Marks a folder as an export and describes the exported model.
IMAGES = "image_tokenizer"  # Folder of the image tokenizer in an export.
# SHA-256 of the files of an export that are loaded.
DIGESTS = "digests.json"
TREE = "params/_METADATA"  # Lists the arrays of an export in the format orbax.
ADAPTER = "adapter_config.json"  # Describes the adapters of an export in the format peft.

# Result of `kind_of` -> description for messages.
KINDS = {
  "stablehlo": "in the format stablehlo",
  "orbax": "in the format orbax",
  "peft": "of adapters alone, in the format peft",
  "int8": "with int8 weights",
}


def kind_of(folder: epath.PathLike) -> str:
  """Returns the key of `KINDS` for an export, or "" for the format hf and for other folders."""
  folder = epath.Path(folder)
  for kind, name in (("stablehlo", "manifest.json"), ("orbax", TREE), ("peft", ADAPTER)):
    if (folder / name).exists():
      return kind
  path = folder / "config.json"
  described = read_foreign_json(path, {}) if path.exists() else {}
  return "int8" if described.get("quantization_config") else ""


def settings_of_run(workdir: epath.PathLike) -> Settings:
  """Reads the settings that `cm3leon train` wrote to train/config.json.

  Raises:
    UserError: nothing was trained in `workdir`, or the file is damaged.
  """
  path = epath.Path(workdir) / "train" / "config.json"
  if not path.exists():
    raise UserError(
      f"{path} does not exist: name the workdir of a run in which `cm3leon train` has started, "
      "or, where a bundle is accepted, the folder or name of a bundle."
    )
  return settings_from_stored(read_json(path, {"settings": dict})["settings"])

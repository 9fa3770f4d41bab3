"""Classifies a folder or name that a user gave, and reads the settings of a run. No JAX."""

from collections.abc import Mapping
import dataclasses
import importlib.resources
import os
from typing import Any, Literal

from etils import epath

from cm3leon_jax.config.settings import Settings, settings_from_stored
from cm3leon_jax.errors import UserError, did_you_mean
from cm3leon_jax.files.json_files import read_foreign_json, read_json

INSTALLED = ("scenes", "scenes-instruct", "illustrations")  # Bundles that the package contains.
BUNDLE = "bundle.json"  # Marks a folder as a bundle and describes it.
ABOUT = "export.json"  # Marks a folder as an export and describes the exported model.
IMAGES = "image_tokenizer"  # Folder of the image tokenizer in an export.
# SHA-256 of the files of an export that are loaded.
DIGESTS = "digests.json"
TREE = "params/_METADATA"  # Lists the arrays of an export in the format orbax.
PUBLISHED_IDS = "published_ids"  # Field of `cm3leon` in config.json, see `has_published_ids`.
ADAPTER = "adapter_config.json"  # Describes the adapters of an export in the format peft.

INIT = "init"  # Folder of a workdir with the parameters that `cm3leon import_weights` wrote.
SETTINGS = "settings"  # Field of its summary: the settings of the import.

Kind = Literal["bundle", "export", "run", "import", ""]
MARKS: dict[Kind, str] = {"bundle": BUNDLE, "export": ABOUT, "run": "train/config.json"}
MARKS["import"] = f"{INIT}/done.json"
# Result of `format_of` -> description for messages.
DESCRIPTIONS = {
  "stablehlo": "in the format stablehlo",
  "orbax": "in the format orbax",
  "peft": "of adapters alone, in the format peft",
  "int8": "with int8 weights",
  "published": "in the vocabulary of a published model",
}


@dataclasses.dataclass(frozen=True)
class Source:
  """A folder or name that a user gave.

  Attributes:
    name: a path, or the name of an installed bundle.
    kind: "run" is a workdir whose training has begun, and "import" a workdir with parameters of
      `cm3leon import_weights` and without a training. A folder of "" is none of these: it may have
      parameters that other programs wrote.
  """

  name: str
  folder: epath.Path
  kind: Kind

  @classmethod
  def of(cls, source: str | os.PathLike[str]) -> "Source":
    """Classifies a path or the name of an installed bundle. A local bundle or run comes first."""
    name, folder = os.fspath(source), epath.Path(source)
    if name in INSTALLED and not ((folder / BUNDLE).exists() or (folder / "train").exists()):
      package = epath.Path(str(importlib.resources.files("cm3leon_jax")))
      return cls(name, package / "assets" / "models" / name, "bundle")
    for kind, file in MARKS.items():
      if (folder / file).exists():
        return cls(name, folder, kind)
    return cls(name, folder, "")

  def check_parent(self) -> None:
    """Raises UserError if a run cannot be tuned from this source: it is no bundle and no run."""
    is_run = (self.folder / "train" / "config.json").exists() or self.kind == "import"
    if self.kind != "bundle" and not is_run:
      raise UserError(
        f"the base (--init_from) is {self.name}; it must be the workdir of a run, with "
        "train/config.json, a bundle that `cm3leon export --bundle` wrote, or the name of an "
        f"installed model, {', '.join(INSTALLED)}: "
        f"{did_you_mean(self.name, INSTALLED, 'check the path.')}"
      )

  def check_workdir(self) -> None:
    """Raises UserError if this source cannot be a workdir: it is an export, or no folder."""
    if not self.folder.is_dir():
      raise UserError(
        f"there is no folder {self.name}: give the workdir of a run, the folder of a bundle, or "
        f"the name of an installed one: {', '.join(INSTALLED)}."
      )
    if self.kind == "export":
      raise UserError(
        f"{self.name} is an export, which only `cm3leon serve` and CM3Leon.load accept: give the "
        "workdir of its run, or a bundle."
      )


def folder_of(source: str | os.PathLike[str]) -> epath.Path:
  """Returns the folder of a path or of the name of an installed bundle."""
  return Source.of(source).folder


def format_of(folder: epath.PathLike) -> str:
  """Returns an export's key of `DESCRIPTIONS`; "" for the format hf and for other folders."""
  folder = epath.Path(folder)
  for name, file in (("stablehlo", "manifest.json"), ("orbax", TREE), ("peft", ADAPTER)):
    if (folder / file).exists():
      return name
  path = folder / "config.json"
  described = read_foreign_json(path, {}) if path.exists() else {}
  if has_published_ids(described):
    return "published"
  return "int8" if described.get("quantization_config") else ""


def has_published_ids(described: Mapping[str, Any]) -> bool:
  """Returns whether config.json is of an export in the vocabulary of a published model."""
  note = described.get("cm3leon")
  return isinstance(note, dict) and note.get(PUBLISHED_IDS) is True


def settings_of_run(workdir: epath.PathLike) -> Settings:
  """Reads the settings that `cm3leon train` wrote to train/config.json, or those of an import.

  If the workdir of an import has a bank, the section retrieval is that of the bank.

  Raises:
    UserError: nothing was trained in `workdir` or imported, or the file is damaged.
  """
  path = epath.Path(workdir) / "train" / "config.json"
  if not path.exists() and (done := path.parents[1] / MARKS["import"]).exists():
    stored = read_json(done, {"summary": dict})["summary"]
    if SETTINGS in stored:
      bank = path.parents[1] / "neighbors" / "done.json"
      built = read_json(bank, {"config": dict})["config"] if bank.exists() else {}
      more = {name: built[name] for name in ("retrieval",) if name in built}
      return settings_from_stored(stored[SETTINGS] | more)
  if not path.exists():
    raise UserError(
      f"{path} does not exist: name the workdir of a run in which `cm3leon train` has started, "
      "or, where a bundle is accepted, the folder or name of a bundle."
    )
  return settings_from_stored(read_json(path, {"settings": dict})["settings"])

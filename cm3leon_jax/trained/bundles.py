"""Reads a bundle: one folder with everything that sampling needs, independent of the training run.

A bundle contains:
  the decoder, in the Hugging Face layout (`huggingface.export`);
  vqgan/, clip/ and text_tokenizer/;
  documents/ and neighbors/, if the run retrieves only from the split `bank`;
  replay/: a sample of the run's documents with their neighbors, for a tuning (`base_documents`);
  training_data.json: origins of the training data;
  unseen_tokens.json: text ids that never occurred in training, if they are known;
  bundle.json: settings, step, training cost, and the SHA-256 of every file.
All weights are float16: numpy can read it, and it rounds weights less than bfloat16 does.
A bundle can name another bundle as its base. Then it contains only a decoder, and uses the
tokenizers, CLIP model, bank and replay documents of the base.
"""

from collections.abc import Mapping
import importlib.resources
import os

from etils import epath

from cm3leon_jax.config import UserError, short
from cm3leon_jax.files.atomic import exists
from cm3leon_jax.files.digests import describe, digest
from cm3leon_jax.files.json_files import read_json
from cm3leon_jax.settings import Settings, settings_from_stored
from cm3leon_jax.tokenizers import text

FILE = "bundle.json"
FIELDS = {"settings": dict, "step": int, "digests": dict}
INSTALLED = ("scenes", "scenes-instruct")  # Bundles that the package contains.
MODEL = ("params.safetensors", "config.json")
# Stage -> the files that a bundle copies from it.
FILES = {"text_tokenizer": text.FILES, "vqgan": MODEL, "clip": MODEL}
REPLAY = "replay"
STORES = ("documents", "neighbors", REPLAY)  # Folders that a bundle may have.
PARTS = (*FILES, *STORES)  # Folders in a bundle.
AGAIN = "install cm3leon_jax again, or write the bundle again with `cm3leon export --bundle`"


def folder_of(source: str | os.PathLike[str]) -> epath.Path:
  """Returns the folder of `source`, a path or the name of an installed bundle."""
  path, name = epath.Path(source), os.fspath(source)
  if name in INSTALLED and not (is_bundle(path) or (path / "train").exists()):
    return epath.Path(str(importlib.resources.files("cm3leon_jax"))) / "assets" / "models" / name
  return path


def is_bundle(folder: epath.PathLike) -> bool:
  """Returns whether a folder contains a complete bundle."""
  return (epath.Path(folder) / FILE).exists()


def check_is_base(source: str) -> None:
  """Checks that --init_from, `source`, is a bundle or a run whose training has begun.

  Raises:
    UserError: it is neither.
  """
  folder = folder_of(source)
  if not is_bundle(folder) and not (folder / "train" / "config.json").exists():
    raise UserError(
      f"--init_from is {source}; it must be the workdir of a run, with train/config.json, a bundle "
      "that `cm3leon export --bundle` wrote, or the name of an installed model: "
      f"{', '.join(INSTALLED)}."
    )


def stages_folder(folder: epath.PathLike) -> epath.Path:
  """Returns the folder that contains the tokenizers, CLIP model and bank of a run or bundle.

  For a bundle with a base, this is the folder of the base, otherwise `folder`.
  """
  folder = epath.Path(folder)
  base = _stored_base(folder, read_json(folder / FILE, {})) if is_bundle(folder) else None
  return folder_of(base["name"]) if base else folder


def _stored_base(folder: epath.Path, stored: dict) -> dict[str, str] | None:
  """Returns {"name", "digest"} of a bundle's base, or None. Raises UserError if malformed."""
  base = stored.get("base")
  if base is None:
    return None
  names = [base.get(key) for key in ("name", "digest")] if isinstance(base, dict) else [None]
  if not all(isinstance(name, str) for name in names):
    raise UserError(
      f"{folder / FILE}: base is {short(base)}; it must be an object with name and digest: {AGAIN}."
    )
  return base


def read(folder: epath.PathLike) -> tuple[Settings, int]:
  """Reads a bundle's settings and step. Checks the digests of its files and of its base's files.

  Raises:
    UserError: a file is absent or has changed.
  """
  folder = epath.Path(folder)
  stored = read_json(folder / FILE, FIELDS)
  check_digests(folder, FILE, stored["digests"], "bundle", AGAIN)
  if base := _stored_base(folder, stored):
    of_base = folder_of(base["name"])
    if digest(of_base / FILE) != base["digest"]:
      raise UserError(
        f"{folder} is a bundle with the base {base['name']}, but {of_base / FILE} "
        f"is absent or belongs to another bundle: {AGAIN}."
      )
    read(of_base)
  return settings_from_stored(stored["settings"]), stored["step"]


def check_digests(
  folder: epath.Path, file: str, digests: Mapping[str, str], what: str, remedy: str
) -> None:
  """Checks the files of a bundle or export (`what`) against the SHA-256 that `file` has of them.

  Raises:
    UserError: a file is absent or has changed, see also `_own_file`.
  """
  for name, expected in digests.items():
    path = _own_file(folder, name, file, remedy)
    found = describe(path)["sha256"] if exists(path) else None
    if found != expected:
      state = "is absent" if found is None else f"has changed since the {what} was written"
      raise UserError(f"{path} {state} (SHA-256 {str(expected)[:12]} expected): {remedy}.")


def _own_file(folder: epath.Path, name: str, file: str = FILE, remedy: str = AGAIN) -> epath.Path:
  """Returns the path of a file that `file` names, which may come from an untrusted source.

  Symbolic links are allowed, because package managers and model hubs link to files elsewhere.

  Raises:
    UserError: the name points outside the folder, or the file is not regular, e.g. /dev/zero.
  """
  path = folder / name
  if "://" in name or name.startswith("/") or ".." in name.split("/"):
    raise UserError(f"{folder / file} names the file '{name}', which is not in {folder}: {remedy}.")
  if "://" not in os.fspath(path) and os.path.exists(path) and not os.path.isfile(path):
    raise UserError(f"{folder / file} names '{name}', which is not a regular file: {remedy}.")
  return path


def about(folder: epath.PathLike) -> dict:
  """Returns {"bytes": size without the base, "cost": the training cost if it is recorded}."""
  folder = epath.Path(folder)
  stored = read_json(folder / FILE, {"digests": dict})
  size = sum(_own_file(folder, name).stat().length for name in stored["digests"])
  return {"bytes": size, "cost": stored.get("cost")}

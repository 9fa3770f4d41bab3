"""Reads a bundle: one folder with all that generates images, without the run that trained it.

It has the decoder in the Hugging Face layout (`huggingface.export`), vqgan/, clip/,
text_tokenizer/, all weights in float16 (finer than bfloat16 for numbers of this size, and read by
numpy), training_data.json (origins of its data), unseen_tokens.json (text ids that training never
met, if that is known), and bundle.json: settings, step, what the training cost, SHA-256 of every
file. If the run retrieves from the split `bank` alone, it has that bank, too: documents/ and
neighbors/.
A bundle on a base has only a decoder; tokenizers, CLIP and bank are those of another bundle.
"""

import importlib.resources
import os

from etils import epath

from cm3leon_jax.config import UserError, short
from cm3leon_jax.files.digests import digest
from cm3leon_jax.files.json_files import read_json
from cm3leon_jax.settings import Settings, settings_from_stored
from cm3leon_jax.tokenizers import text

FILE = "bundle.json"
FIELDS = {"settings": dict, "step": int, "digests": dict}
INSTALLED = ("scenes", "scenes-instruct")  # Bundles that come with the package.
MODEL = ("params.safetensors", "config.json")
FILES = {"text_tokenizer": text.FILES, "vqgan": MODEL, "clip": MODEL}  # Of stages.
PARTS = (*FILES, "documents", "neighbors")  # Folders in a bundle.
AGAIN = "install cm3leon_jax again, or write the bundle again with `cm3leon export --bundle`"


def folder_of(source: str | os.PathLike[str]) -> epath.Path:
  """Returns the folder that `source` names: a path, or the name of an installed bundle."""
  path, name = epath.Path(source), os.fspath(source)
  if name in INSTALLED and not (is_bundle(path) or (path / "train").exists()):
    return epath.Path(str(importlib.resources.files("cm3leon_jax"))) / "assets" / "models" / name
  return path


def is_bundle(folder: epath.PathLike) -> bool:
  """Returns whether `write` has finished in `folder`."""
  return (epath.Path(folder) / FILE).exists()


def stages_folder(folder: epath.PathLike) -> epath.Path:
  """Returns where tokenizers, CLIP and bank of a run or bundle are: its folder, or its base's."""
  folder = epath.Path(folder)
  base = _stored_base(folder, read_json(folder / FILE, {})) if is_bundle(folder) else None
  return folder_of(base["name"]) if base else folder


def _stored_base(folder: epath.Path, stored: dict) -> dict[str, str] | None:
  """Returns name and digest of the base that a bundle.json names; raises UserError if damaged."""
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
  """Reads settings and step of a bundle; raises UserError if a file is not the one written.

  The files of its base are checked, too.
  """
  folder = epath.Path(folder)
  stored = read_json(folder / FILE, FIELDS)
  for name, expected in stored["digests"].items():
    found = digest(_own_file(folder, name))
    if found != expected:
      state = "is absent" if found is None else "has another content than the bundle was made with"
      raise UserError(f"{folder / name} {state} (SHA-256 {expected[:12]} expected): {AGAIN}.")
  if base := _stored_base(folder, stored):
    of_base = folder_of(base["name"])
    if digest(of_base / FILE) != base["digest"]:
      raise UserError(
        f"{folder} is a bundle on the base {base['name']}, and {of_base / FILE} "
        f"is absent or of another bundle: {AGAIN}."
      )
    read(of_base)
  return settings_from_stored(stored["settings"]), stored["step"]


def _own_file(folder: epath.Path, name: str) -> epath.Path:
  """Returns the path of a file of a bundle, which may come from a stranger.

  Links are followed: stores of packages and hubs keep their files elsewhere.

  Raises:
    UserError: the name leads out of the folder, or to what is no file, such as /dev/zero.
  """
  path = folder / name
  if "://" in name or name.startswith("/") or ".." in name.split("/"):
    raise UserError(f"{folder / FILE} names the file '{name}', which is not in {folder}: {AGAIN}.")
  if "://" not in os.fspath(path) and os.path.exists(path) and not os.path.isfile(path):
    raise UserError(f"{folder / FILE} names '{name}', which is no file: {AGAIN}.")
  return path


def about(folder: epath.PathLike) -> dict:
  """Describes a bundle: {"bytes" of its own files, "cost": as `write` got it, or None}."""
  folder = epath.Path(folder)
  stored = read_json(folder / FILE, {"digests": dict})
  size = sum(_own_file(folder, name).stat().length for name in stored["digests"])
  return {"bytes": size, "cost": stored.get("cost")}

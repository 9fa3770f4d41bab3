"""Reads an export in the format hf or orbax. Such an export has no CLIP model and no bank."""

import os

from etils import epath

from cm3leon_jax import distributed
from cm3leon_jax.config import UserError
from cm3leon_jax.files.json_files import read_json
from cm3leon_jax.models.config import ModelConfig
from cm3leon_jax.settings import Settings, settings_from_stored
from cm3leon_jax.trained import bundles, orbax_export
from cm3leon_jax.trained.kinds import ABOUT, IMAGES, KINDS, kind_of
from cm3leon_jax.weights import placed
from cm3leon_jax.weights.stored_tensors import StoredTensors


def is_export(source: str | os.PathLike[str]) -> bool:
  """Returns whether `cm3leon export` wrote the folder `source` and the folder is not a bundle."""
  folder = bundles.folder_of(source)
  return (folder / ABOUT).exists() and not bundles.is_bundle(folder)


def read(folder: epath.Path) -> tuple[Settings, int]:
  """Reads the settings and the step of an export.

  Raises:
    UserError: the format is only for other programs or rounds the parameters to int8, an earlier
      version wrote the export, or the export has a published image tokenizer.
  """
  if (kind := kind_of(folder)) not in ("", "orbax"):
    raise UserError(
      f"{folder} is an export {KINDS[kind]}, which is for other programs: load the workdir of its "
      "run, or an export in the format hf or orbax."
    )
  stored = read_json(folder / ABOUT, {"step": int})
  if "settings" not in stored:
    raise UserError(
      f"{folder} was written by an older version and has no settings: run "
      "`cm3leon export` again, or load the workdir of its run."
    )
  if "vqgan" not in read_json(folder / IMAGES / "config.json"):
    raise UserError(
      f"{folder} has a published image tokenizer in the format of its release, which cannot be "
      "loaded here: load the workdir of its run."
    )
  return settings_from_stored(stored["settings"]), stored["step"]


def load_params(folder: epath.PathLike, config: ModelConfig) -> dict:
  """Loads the parameters of an export or bundle onto the current mesh.

  All processes must call this function.

  Raises:
    UserError: a file is absent or damaged.
  """
  folder = epath.Path(folder)
  if orbax_export.exists(folder):
    return orbax_export.load(folder, placed.types_of(config))
  with distributed.together():
    try:
      return placed.load(StoredTensors(folder), config)
    except UserError as error:
      raise UserError(f"{error} Write the folder again: `cm3leon export`.") from error

"""Reads an export in the format orbax, which `export.orbax_checkpoint` writes."""

import os

from etils import epath
import orbax.checkpoint as ocp

from cm3leon_jax.checkpoints import sealing
from cm3leon_jax.config import UserError
from cm3leon_jax.files.atomic import absolute
from cm3leon_jax.files.json_files import read_json
from cm3leon_jax.trained.kinds import DIGESTS

FOLDER = "params"


def exists(folder: epath.PathLike) -> bool:
  """Returns whether a folder is a complete export of this format."""
  return (epath.Path(folder) / DIGESTS).exists()


def load(folder: epath.PathLike, types: dict) -> dict:
  """Restores the parameters of an export with the shapes, dtypes and shardings of `types`.

  Raises:
    UserError: a file is damaged.
  """
  folder = absolute(folder)
  digests = read_json(folder / DIGESTS, {})
  if damage := sealing.damage(folder / FOLDER, digests):
    raise UserError(f"{damage}: run `cm3leon export` again.")
  with ocp.StandardCheckpointer() as checkpointer:
    return checkpointer.restore(os.fspath(folder / FOLDER), types)

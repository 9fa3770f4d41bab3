"""Reads exports in the formats hf and orbax, which contain no CLIP model and no bank."""

import os

from etils import epath
from flax import traverse_util
import orbax.checkpoint as ocp
import tensorstore as ts

from cm3leon_jax import distributed
from cm3leon_jax.checkpoints import sealing
from cm3leon_jax.config import UserError
from cm3leon_jax.files import foreign
from cm3leon_jax.files.atomic import absolute
from cm3leon_jax.files.json_files import read_json
from cm3leon_jax.models.config import ModelConfig
from cm3leon_jax.settings import Settings, settings_from_stored
from cm3leon_jax.trained import bundles
from cm3leon_jax.trained.kinds import ABOUT, DIGESTS, IMAGES, KINDS, kind_of
from cm3leon_jax.weights import placed
from cm3leon_jax.weights.stored import array_spec
from cm3leon_jax.weights.stored_tensors import StoredTensors

ORBAX = "params"  # Folder of the parameters in an orbax export.


def is_export(source: str | os.PathLike[str]) -> bool:
  """Returns whether `source` is a folder that `cm3leon export` wrote, other than a bundle."""
  folder = bundles.folder_of(source)
  return (folder / ABOUT).exists() and not bundles.is_bundle(folder)


def is_orbax(folder: epath.PathLike) -> bool:
  """Returns whether a folder is a complete export in the format orbax."""
  return (epath.Path(folder) / DIGESTS).exists()


def check(folder: epath.PathLike) -> None:
  """Checks the files of an export, which may come from an untrusted source, before it is read."""
  foreign.check_folder(folder, (IMAGES, ORBAX))


@foreign.reads("an export")
def read(folder: epath.Path) -> tuple[Settings, int]:
  """Reads the settings and the step of an export.

  Raises:
    UserError: the format is only for other programs or rounds the parameters to int8, an earlier
      version wrote the export, the export has a published image tokenizer, or a file is wrong.
  """
  check(folder)
  if (kind := kind_of(folder)) == "peft":
    raise UserError(
      f"{folder} is an export {KINDS[kind]}: load their base, and name this folder by adapter, as "
      "in CM3Leon.load(BASE, adapter=FOLDER)."
    )
  if kind not in ("", "orbax"):
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


@foreign.reads("a bundle or export")
def load_params(folder: epath.PathLike, config: ModelConfig) -> dict:
  """Loads the parameters of an export or bundle onto the current mesh.

  All processes must call this function.

  Raises:
    UserError: a file is absent or damaged.
  """
  folder = epath.Path(folder)
  check(folder)
  if is_orbax(folder):
    params, types = absolute(folder) / ORBAX, placed.types_of(config)
    if damage := sealing.damage(params, read_json(folder / DIGESTS, {})):
      raise UserError(f"{damage}: run `cm3leon export` again.")
    for name, kind in traverse_util.flatten_dict(types, sep=".").items():
      about = ts.open(array_spec(params, name), open=True).result().spec().to_json()["metadata"]
      chunks = zip(about["chunks"], kind.shape, strict=True)
      # TensorStore allocates memory for a chunk, and for whatever a compressed chunk expands to.
      if about["compressor"] or any(chunk > size for chunk, size in chunks):
        raise UserError(f"{params}: the array {name} is not as `cm3leon export` writes it.")
    with ocp.StandardCheckpointer() as checkpointer:
      return checkpointer.restore(os.fspath(params), types)
  with distributed.together():
    try:
      return placed.load(StoredTensors(folder), config)
    except UserError as error:
      raise UserError(f"{error} Run `cm3leon export` again.") from error

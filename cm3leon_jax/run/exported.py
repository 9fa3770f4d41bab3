"""Reads exports in the formats hf and orbax, which contain no CLIP model and no bank."""

import os

from etils import epath
from flax import traverse_util
import jax
import orbax.checkpoint as ocp
import tensorstore as ts

from cm3leon_jax import distributed
from cm3leon_jax.config.model import ModelConfig
from cm3leon_jax.config.settings import Settings, settings_from_stored
from cm3leon_jax.errors import UserError
from cm3leon_jax.files import foreign
from cm3leon_jax.files.atomic import absolute
from cm3leon_jax.files.digests import digest_of_json
from cm3leon_jax.files.json_files import read_foreign_json, read_json
from cm3leon_jax.run import bundles
from cm3leon_jax.run.source import ABOUT, DESCRIPTIONS, DIGESTS, IMAGES, TREE, format_of
from cm3leon_jax.weights import placed, sealing
from cm3leon_jax.weights.stored import array_spec
from cm3leon_jax.weights.stored_tensors import StoredTensors

ORBAX = "params"  # Folder of the parameters in an orbax export.
PLACES = (IMAGES, ORBAX, "custom_generate")
AGAIN = "run `cm3leon export` again"


def is_orbax(folder: epath.PathLike) -> bool:
  """Returns whether a folder is a complete export in the format orbax."""
  return all((epath.Path(folder) / name).exists() for name in (TREE, DIGESTS))


def _digests(folder: epath.Path) -> tuple[dict[str, str], dict[str, str]]:
  """Returns the digests of the files in params/, by their paths there, and of all other files."""
  listed = read_foreign_json(folder / DIGESTS, {})
  others = {name: x for name, x in listed.items() if not name.startswith(f"{ORBAX}/")}
  of_params = {name: x for name, x in listed.items() if name not in others}
  return {name.removeprefix(f"{ORBAX}/"): x for name, x in of_params.items()}, others


def check(folder: epath.Path, part: str = "") -> list[str]:
  """Checks the files of an export, which may come from an untrusted source, before it is read.

  Only files whose path begins with `part` are compared with their digests, and `load_params`
  compares those of params/. Folders that other programs wrote have no digests. Returns the names of
  the files.

  Raises:
    UserError: a file is absent or has changed, see also `foreign.check_folder`.
  """
  files = foreign.check_folder(folder, PLACES)
  if (folder / ABOUT).exists():
    if not (folder / DIGESTS).exists():
      raise UserError(f"{folder} is an export without its {DIGESTS}: {AGAIN}.")
    listed = {name: x for name, x in _digests(folder)[1].items() if name.startswith(part)}
    bundles.check_digests(folder, listed, files, AGAIN)
  return files


def digest_of_params(folder: epath.Path) -> str:
  """Returns the SHA-256 of the digests of the parameters in an orbax export."""
  return digest_of_json(_digests(folder)[0])


@foreign.reads("an export")
def read(folder: epath.Path) -> tuple[Settings, int]:
  """Reads the settings and the step of an export.

  Raises:
    UserError: the format is only for other programs or rounds the parameters to int8, or a file
      is wrong.
  """
  check(folder)
  if (kind := format_of(folder)) not in ("", "orbax"):
    raise UserError(
      f"{folder} is an export {DESCRIPTIONS[kind]}, which is for other programs: load the workdir "
      "of its run, or an export in the format hf or orbax."
    )
  stored = read_json(folder / ABOUT, {"step": int, "settings": dict})
  return settings_from_stored(stored["settings"]), stored["step"]


@foreign.reads("a bundle or export")
def load_params(folder: epath.PathLike, config: ModelConfig, dtype: str = "float32") -> dict:
  """Loads the parameters of an export or bundle onto the current mesh.

  All processes must call this function. The result has the dtype `dtype` if all parameters are
  stored in it, and fp32 otherwise.

  Raises:
    UserError: a file is absent or damaged.
  """
  folder = epath.Path(folder)
  files = check(folder)
  if is_orbax(folder):
    params, types, digests = absolute(folder) / ORBAX, placed.types_of(config), _digests(folder)[0]
    if wrong := sorted({f"{ORBAX}/{name}" for name in digests} - {*files}):
      raise UserError(f"{folder / wrong[0]} is absent, or is not in the folder: {AGAIN}.")
    if damage := sealing.damage(params, digests):
      raise UserError(f"{damage}: {AGAIN}.")
    stored = set()
    for name, kind in traverse_util.flatten_dict(types, sep=".").items():
      about = ts.open(array_spec(params, name), open=True).result().spec().to_json()["metadata"]
      chunks = zip(about["chunks"], kind.shape, strict=True)
      stored.add(about["dtype"])
      # TensorStore allocates memory for a chunk, and for whatever a compressed chunk expands to.
      if about["compressor"] or any(chunk > size for chunk, size in chunks):
        raise UserError(f"{params}: the array {name} is not as `cm3leon export` writes it.")
    if stored == {dtype}:
      types = jax.tree.map(lambda x: x.update(dtype=dtype), types)
    with ocp.StandardCheckpointer() as checkpointer:
      return checkpointer.restore(os.fspath(params), types)
  with distributed.together():
    return placed.load(StoredTensors(folder), config, dtype)

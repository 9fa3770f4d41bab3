"""Writes the files of a plan into a folder, in place of those of the plan before."""

from collections.abc import Mapping
import hashlib

from etils import epath

from cm3leon_jax.config import UserError
from cm3leon_jax.files.json_files import read_json, write_json

NUMBERS = "plan.json"


def _digest(content: bytes) -> str:
  return hashlib.sha256(content).hexdigest()


def _written(folder: epath.Path) -> dict[str, str]:
  """Reads name -> digest of the files that the plan before wrote; {} without such a plan.

  Raises:
    UserError: plan.json does not say so.
  """
  path = folder / NUMBERS
  if not path.exists():
    return {}
  try:
    files = read_json(path, {"files": dict})["files"]
  except UserError as error:
    raise UserError(
      f"{path} does not say which files its plan wrote: delete it, or give another --out."
    ) from error
  return {name: digest for name, digest in files.items() if epath.Path(name).name == name}


def check(folder: epath.Path, texts: Mapping[str, str]) -> list[str]:
  """Returns the names of files that the plan before wrote and this one does not.

  Args:
    folder: of --out; it may not exist yet.
    texts: name of each file -> its text.

  Raises:
    UserError: a file that would be replaced or removed is not as the plan before left it.
  """
  written = _written(folder)
  there = [name for name in sorted({*texts, *written}) if (folder / name).exists()]
  for name in there:
    content = (folder / name).read_bytes()
    same = name in texts and content == texts[name].encode()
    if not same and _digest(content) != written.get(name):
      raise UserError(
        f"{folder / name} was changed after `cm3leon plan` wrote it, or is of something else, and "
        "would be lost: move it away, or give another --out."
      )
  return [name for name in there if name not in texts]


def write(folder: epath.Path, texts: Mapping[str, str], numbers: Mapping) -> list[str]:
  """Writes files and plan.json; removes files of the plan before that this one does not have.

  Args:
    folder: of --out; made if it does not exist.
    texts: name of each file -> its text.
    numbers: content of plan.json, to which the digests of the files are added.

  Returns:
    Names of the files that were removed.

  Raises:
    UserError: as `check`; nothing was written then.
  """
  surplus = check(folder, texts)
  folder.mkdir(parents=True, exist_ok=True)
  for name, text in texts.items():
    (folder / name).write_bytes(text.encode())
  for name in surplus:
    (folder / name).unlink()
  digests = {name: _digest(text.encode()) for name, text in texts.items()}
  write_json(folder / NUMBERS, {**numbers, "files": digests})
  return surplus

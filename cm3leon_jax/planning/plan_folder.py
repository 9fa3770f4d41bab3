"""Writes the files of a plan into a folder and replaces the files of an earlier plan."""

from collections.abc import Mapping

from etils import epath

from cm3leon_jax.config import UserError
from cm3leon_jax.files.digests import digest
from cm3leon_jax.files.json_files import read_json, write_json

NUMBERS = "plan.json"


def _written(folder: epath.Path) -> dict[str, str]:
  """Reads name -> digest of the files that the last plan wrote; {} without such a plan."""
  path = folder / NUMBERS
  if not path.exists():
    return {}
  try:
    files = read_json(path, {"files": dict})["files"]
  except UserError as error:
    raise UserError(
      f"{path} does not list the files of its plan: delete it, or give another --out."
    ) from error
  return {name: digest for name, digest in files.items() if epath.Path(name).name == name}


def check(folder: epath.Path, texts: Mapping[str, str]) -> list[str]:
  """Returns the names of the files that the last plan wrote and this plan does not write.

  `folder` is the value of --out and may not exist yet. `texts` is file name -> text.

  Raises:
    UserError: a file that would be replaced or removed has changed since the last plan wrote it.
  """
  written = _written(folder)
  there = [name for name in sorted({*texts, *written}) if (folder / name).exists()]
  for name in there:
    same = name in texts and (folder / name).read_bytes() == texts[name].encode()
    if not same and digest(folder / name) != written.get(name):
      raise UserError(
        f"{folder / name} was changed after `cm3leon plan` wrote it, or is not from a plan, and "
        "would be lost: move it away, or give another --out."
      )
  return [name for name in there if name not in texts]


def write(folder: epath.Path, texts: Mapping[str, str], numbers: Mapping) -> list[str]:
  """Writes files and plan.json, and removes files of the last plan that this plan does not write.

  `folder` is created if it does not exist. `texts` is file name -> text. The digests of the files
  are added to `numbers`, the content of plan.json. Returns the names of the removed files.

  Raises:
    UserError: see `check`. In this case nothing is written.
  """
  surplus = check(folder, texts)
  folder.mkdir(parents=True, exist_ok=True)
  for name, text in texts.items():
    (folder / name).write_bytes(text.encode())
  for name in surplus:
    (folder / name).unlink()
  digests = {name: digest(folder / name) for name in texts}
  write_json(folder / NUMBERS, {**numbers, "files": digests})
  return surplus

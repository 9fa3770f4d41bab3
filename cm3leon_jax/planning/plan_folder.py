"""Writes the files of a plan to a folder, where they replace the files of the previous plan."""

from collections.abc import Mapping

from etils import epath

from cm3leon_jax.errors import UserError
from cm3leon_jax.files.digests import digest
from cm3leon_jax.files.json_files import read_json, write_json

NUMBERS = "plan.json"


def _written(folder: epath.Path) -> dict[str, str]:
  """Maps the files that the previous plan wrote to their digests; {} without a previous plan."""
  path = folder / NUMBERS
  if not path.exists():
    return {}
  files = read_json(path, {"files": dict})["files"]
  return {name: digest for name, digest in files.items() if epath.Path(name).name == name}


def check(folder: epath.Path, texts: Mapping[str, str]) -> list[str]:
  """Returns the names of the previous plan's files that this plan does not write.

  `folder` is the value of --out and need not exist. `texts` maps file names to texts.

  Raises:
    UserError: a file that would be replaced or removed has changed since the previous plan wrote
      it.
  """
  written = _written(folder)
  there = [name for name in sorted({*texts, *written}) if (folder / name).exists()]
  for name in there:
    same = name in texts and (folder / name).read_bytes() == texts[name].encode()
    if not same and digest(folder / name) != written.get(name):
      raise UserError(
        f"{folder / name} would be lost, because it is not from a plan or was changed after "
        "`cm3leon plan` wrote it: move it away, or choose another --out."
      )
  return [name for name in there if name not in texts]


def write(folder: epath.Path, texts: Mapping[str, str], numbers: Mapping) -> list[str]:
  """Writes files and plan.json. Removes the previous plan's files that this plan does not write.

  `folder` is created if it does not exist. `texts` maps file names to texts. plan.json contains
  `numbers` and the digests of the files. Returns the names of the removed files.

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

"""Converts bundles and tokenizers of version 0.3, which store fields that were removed since.

  python -m tools.convert_bundle cm3leon_jax/assets/models/illustrations

The files of a bundle that name the fields, and the digests of these files, are written again. Name
a bundle before those that were written with --base=BUNDLE.
"""

import sys
from typing import Any

from etils import epath

from cm3leon_jax.files.digests import digest
from cm3leon_jax.files.json_files import read_json, write_json
from cm3leon_jax.run import bundles
from cm3leon_jax.run.source import folder_of

REMOVED = {"adapter.tokens", "model.code_colors", "published.gumbel", "vqgan.num_colors"}
FILES = ("config.json", "vqgan/config.json")


def current(value: Any, section: str = "") -> Any:
  """Returns nested dicts without the fields in `REMOVED`."""
  if not isinstance(value, dict):
    return value
  return {k: current(v, k) for k, v in value.items() if f"{section}.{k}" not in REMOVED}


def convert(folder: epath.Path) -> None:
  """Writes the files of a bundle or tokenizer again."""
  for path in (folder / name for name in FILES if (folder / name).exists()):
    if (new := current(old := read_json(path))) != old:
      write_json(path, new)
  if (folder / bundles.FILE).exists():
    stored = current(read_json(folder / bundles.FILE))
    stored["digests"] = {name: digest(folder / name) for name in stored["digests"]}
    if base := stored.get("base"):
      base["digest"] = digest(folder_of(base["name"]) / bundles.FILE)
    write_json(folder / bundles.FILE, stored)


if __name__ == "__main__":
  for argument in sys.argv[1:]:
    convert(epath.Path(argument))

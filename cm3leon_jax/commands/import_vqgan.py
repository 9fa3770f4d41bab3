"""Imports a published or exported image tokenizer; replaces `cm3leon train_vqgan`.

  cm3leon import_vqgan --config=cm3leon_350m --workdir=workdir/run \\
    --source=amused-256 --family=amused

--source is a .safetensors file or a folder that contains one. Pickle files are refused. For an
export of this project, --source is EXPORT/image_tokenizer. The names of the tensors show the
family; with --family, other weights are refused. docs/weights.md lists the supported weights, how
to convert them, and their configs: amused has 256 codes for 256x256 pixels, chameleon 1,024 codes
for 512x512 pixels.
"""

from __future__ import annotations

import dataclasses

from etils import epath, epy

from cm3leon_jax.commands import common, flag
from cm3leon_jax.config.settings import Settings
from cm3leon_jax.config.tokenizers import Family
from cm3leon_jax.errors import UserError

with epy.lazy_imports():
  from cm3leon_jax.importing import images
  from cm3leon_jax.run import exported
  from cm3leon_jax.run import source as source_lib
  from cm3leon_jax.tokenizers import published_files


@dataclasses.dataclass(frozen=True)
class Flags(flag.Fields):
  source: str = ""
  """File or folder with the weights, as safetensors."""
  family: Family | None = None
  """Network that the weights belong to (default: config.vqgan.published, or found by the names)."""


def main(settings: Settings, workdir: epath.Path, flags: Flags) -> None:
  source, family = flags.source, flags.family
  if not source:
    raise UserError("name the file or folder with the weights: --source=amused-256")
  named = settings.vqgan.published
  if named and family not in (None, named):
    raise UserError(
      f"--family is {family}, but config.vqgan.published is {named}: leave out --family, or give "
      f"--config.vqgan.published={family}."
    )
  for parent in epath.Path(source).parents[:2]:
    if source_lib.Source.of(parent).kind == "export":
      exported.check(parent, f"{source_lib.IMAGES}/")
  folder = workdir / "vqgan"
  images.check_folder(folder)
  if published_files.is_own(source):
    found = published_files.read_own(source)
  else:
    found = published_files.read(source, family or named or None)
  for line in images.write(settings, folder, found):
    print(f"import_vqgan: {line}", flush=True)


if __name__ == "__main__":
  common.run(main, Flags)

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

from absl import flags
from etils import epath, epy

from cm3leon_jax.commands import common
from cm3leon_jax.config.settings import Settings
from cm3leon_jax.errors import UserError
from cm3leon_jax.stages import stages, table

with epy.lazy_imports():
  from cm3leon_jax.config import tokenizers as tokenizers_config
  from cm3leon_jax.files import digests as digests_lib
  from cm3leon_jax.run import exported
  from cm3leon_jax.run import source as source_lib
  from cm3leon_jax.tokenizers import published_files, vqgan
  from cm3leon_jax.training.image_models import trainer

FAMILIES = ("amused", "chameleon", "llamagen", "janus")
_SOURCE = flags.DEFINE_string("source", "", "File or folder with the weights, as safetensors.")
_FAMILY = flags.DEFINE_enum(
  "family",
  None,
  FAMILIES,
  "Network that the weights belong to (default: config.vqgan.published, or found by the names).",
)


def _check_folder(folder: epath.Path) -> None:
  """Raises UserError if a VQGAN was trained in the folder, or its training has begun."""
  imported = vqgan.is_published(folder) or stages.command_of(folder) == "import_vqgan"
  if ((folder / vqgan.CONFIG).exists() and not imported) or (folder / trainer.FOLDER).exists():
    raise UserError(
      f"{folder} has a VQGAN of cm3leon train_vqgan: use another --workdir, or delete that folder."
    )


def main(
  settings: Settings, workdir: epath.Path, source: str, family: tokenizers_config.Family | None
) -> None:
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
  _check_folder(folder)
  if published_files.is_own(source):
    found = published_files.read_own(source)
  else:
    found = published_files.read(source, family or named or None)
  tokenizer = published_files.fit(found.tokenizer, settings.vocab.image_size, settings.vqgan)
  name: str = getattr(tokenizer.config, "family", "")  # "": trained with this project.
  digests = [digests_lib.digest(path) for path in found.files]
  left = f", without {found.num_left} other tensors" if found.num_left else ""
  kind = name or "trained by cm3leon train_vqgan"
  print(
    f"import_vqgan: {kind}, {found.num_parameters:,} parameters in {found.num_tensors} tensors"
    f"{left}.",
    flush=True,
  )
  for path, sha256 in zip(found.files, digests):
    print(f"import_vqgan: read {path}, SHA-256 {sha256}.", flush=True)
  config = {
    "command": "import_vqgan",
    "family": name,
    "sha256": digests,
    "vqgan": {"resolution": settings.vqgan.resolution, "downsample": settings.vqgan.downsample},
    "vocab": {"image_size": settings.vocab.image_size},
  }
  with stages.once(folder, config, files=table.STAGES["vqgan"].files) as summary:
    if summary is None:
      return
    tokenizer.save(folder)
    sizes, side = tokenizer.config, settings.vqgan.resolution // settings.vqgan.downsample
    summary.update(family=name, parameters=found.num_parameters, code_dim=sizes.code_dim)
    print(
      f"import_vqgan: {sizes.resolution}x{sizes.resolution} pixels are {side}x{side} = "
      f"{sizes.image_tokens:,} of {tokenizer.num_codes:,} codes, each of width {sizes.code_dim}; "
      f"in {folder}.",
      flush=True,
    )


if __name__ == "__main__":
  common.run(lambda settings, workdir: main(settings, workdir, _SOURCE.value, _FAMILY.value))

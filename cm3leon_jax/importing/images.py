"""Writes an imported image tokenizer to the folder vqgan/ of a workdir."""

from collections.abc import Iterator

from etils import epath

from cm3leon_jax.config.settings import Settings
from cm3leon_jax.errors import UserError
from cm3leon_jax.files import digests as digests_lib
from cm3leon_jax.stages import stages, table
from cm3leon_jax.tokenizers import published_files, vqgan
from cm3leon_jax.tokenizers.published_files import Read
from cm3leon_jax.training.image_models import trainer


def check_folder(folder: epath.Path) -> None:
  """Raises UserError if a VQGAN was trained in the folder, or its training has begun."""
  imported = vqgan.is_published(folder) or stages.command_of(folder) == "import_vqgan"
  if ((folder / vqgan.CONFIG).exists() and not imported) or (folder / trainer.FOLDER).exists():
    raise UserError(
      f"{folder} has a VQGAN of cm3leon train_vqgan: use another --workdir, or delete that folder."
    )


def write(settings: Settings, folder: epath.Path, found: Read) -> Iterator[str]:
  """Writes the tokenizer `found` for the image size in `settings`, unless it is there already.

  Yields sentences that say what was read and done.

  Raises:
    UserError: the config has other sizes, or the folder has another tokenizer.
  """
  check_folder(folder)
  tokenizer = published_files.fit(found.tokenizer, settings.vocab.image_size, settings.vqgan)
  name: str = getattr(tokenizer.config, "family", "")  # "": trained with this project.
  digests = [digests_lib.digest(path) for path in found.files]
  left = f", without {found.num_left} other tensors" if found.num_left else ""
  kind = name or "trained by cm3leon train_vqgan"
  yield f"{kind}, {found.num_parameters:,} parameters in {found.num_tensors} tensors{left}."
  for path, sha256 in zip(found.files, digests):
    yield f"read {path}, SHA-256 {sha256}."
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
  yield (
    f"{sizes.resolution}x{sizes.resolution} pixels are {side}x{side} = {sizes.image_tokens:,} of "
    f"{tokenizer.num_codes:,} codes, each of width {sizes.code_dim}; in {folder}."
  )

"""Checks the published models of a config before the first stage of a run begins.

A stage reads them hours later, after the data is prepared and encoded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cm3leon_jax.config import UserError
from cm3leon_jax.runs import stages

if TYPE_CHECKING:
  from etils import epath

  from cm3leon_jax.settings import Settings


def not_imported(settings: Settings, folder: epath.Path) -> str:
  """Returns the sentence about a published tokenizer that is missing in `folder`, vqgan/."""
  return (
    f"config.vqgan.published is {settings.vqgan.published}, but {folder} has no image tokenizer: "
    "run `cm3leon import_vqgan --source=FOLDER` with the same --config and --workdir first "
    "(docs/published_350m.md)."
  )


def check(settings: Settings, workdir: epath.Path, copied: bool = False) -> None:
  """Checks the image tokenizer, unless it is `copied` from another run, and CLIP.

  Raises:
    UserError: the tokenizer is not imported or has another grid of codes, or a file of CLIP is
      absent or wrong.
  """
  if settings.vqgan.published and not copied:
    _check_tokenizer(settings, workdir / "vqgan")
  if settings.retrieval.clip and not (workdir / "neighbors" / stages.DONE).exists():
    _check_clip(settings.retrieval.clip)


def _check_tokenizer(settings: Settings, folder: epath.Path) -> None:
  if not (folder / stages.DONE).exists():
    raise UserError(not_imported(settings, folder))
  stored = stages.require(folder.parent, folder.name, config=dict)["config"]
  if stored.get("command") == "import_vqgan":
    sizes = {name: getattr(settings.vqgan, name) for name in stored["vqgan"]}
    codes = {"image_size": settings.vocab.image_size}
    found = {"vqgan": stored["vqgan"], "vocab": stored["vocab"]}
    stages.check_same_config(folder, found, {"vqgan": sizes, "vocab": codes})


def _check_clip(folder: str) -> None:
  from cm3leon_jax.clip import checkpoint

  try:
    config = checkpoint.read_config(folder)
    checkpoint.read_processing(folder, config)
    checkpoint.read_tensors(folder, config)
  except UserError as error:
    raise UserError(f"config.retrieval.clip: {error}") from error

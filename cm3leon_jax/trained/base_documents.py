"""Finds the documents of a base, the run or bundle that a tuning starts from.

A tuning run reads them for two reasons: replay of training documents reduces forgetting, and the
loss of held-out documents shows how much the tuned model forgets. A workdir has its documents. A
bundle whose world draws its data gets them from `cm3leon prepare_base`, which draws them again in
base/ of the tuned run's workdir.
"""

import dataclasses
from typing import Any

from etils import epath

from cm3leon_jax import worlds
from cm3leon_jax.config import UserError
from cm3leon_jax.files.json_files import read_json
from cm3leon_jax.runs import from_data, stages
from cm3leon_jax.settings import Settings, settings_of_run
from cm3leon_jax.trained import bundles

FOLDER = "base"  # Folder of a workdir with the documents that were drawn again.
NAME = "base"  # Name of the source of these documents in rows and logs.
READ = ("documents", "neighbors")
NUM_HELDOUT = 400  # Number of held-out documents that a world draws.


@dataclasses.dataclass(frozen=True)
class Base:
  """A folder with the documents and neighbors of a base, and the base's settings."""

  settings: Settings
  folder: epath.Path


def is_complete(folder: epath.Path) -> bool:
  """Returns whether a folder has finished documents and neighbors."""
  return all((folder / name / stages.DONE).exists() for name in READ)


def can_draw(settings: Settings) -> bool:
  """Returns whether a world can draw the documents of a base with these settings again."""
  return settings.raw.source in worlds.MODULES


def source_of(workdir: epath.PathLike) -> str:
  """Returns the base of a run, as the user named it.

  Raises:
    UserError: the tokenizers in `workdir` were not copied from another run.
  """
  path = epath.Path(workdir) / "text_tokenizer" / stages.DONE
  source = read_json(path, {}).get("summary", {}).get("copied_from") if path.exists() else None
  if not source:
    raise UserError(
      f"config.data.base_documents is set, but the tokenizers in {workdir} were not copied from "
      "another run: run `cm3leon copy_tokenizers --init_from=RUN` first, or set it to 0."
    )
  return str(source)


def find(source: str) -> tuple[Settings, epath.Path | None]:
  """Returns the settings of a workdir or bundle, and the folder with its documents.

  The folder is None for a bundle, which has no held-out documents, and for a workdir without
  finished documents.

  Raises:
    UserError: `source` is neither of them.
  """
  bundles.check_is_base(source)
  folder = bundles.folder_of(source)
  if bundles.is_bundle(folder):
    return bundles.read(folder)[0], None
  return settings_of_run(folder), folder if is_complete(folder) else None


def fields(source: str, own_images: bool) -> dict[str, Any]:
  """Returns the config fields that a tuning has in common with its base (`from_data.base_fields`).

  If the run trains its own image tokenizer (`own_images`), the codes of the base's documents have
  no meaning for it, so it does not use them.
  """
  settings, folder = find(source)
  documents = not own_images and (folder is not None or can_draw(settings))
  found = from_data.base_fields(dataclasses.asdict(settings), documents)
  if own_images:  # The batch must not be larger than the data, and nothing is imported.
    del found["vqgan.batch_size"]
    found["vqgan.published"] = ""
  return found


def to_draw(of_base: Settings, settings: Settings, workdir: epath.PathLike) -> Base:
  """Returns the folder and settings with which a world draws documents for the run in `workdir`.

  `of_base` are the settings of the base, and `settings` are those of the run.
  """
  world = of_base.raw.source
  numbers = {"train": settings.data.base_documents, "heldout": NUM_HELDOUT}
  few = dataclasses.replace(getattr(of_base, world), **numbers)
  return Base(dataclasses.replace(of_base, **{world: few}), epath.Path(workdir) / FOLDER)


def open_base(settings: Settings, workdir: epath.PathLike) -> Base:
  """Finds the documents of the base of the run in `workdir`.

  Raises:
    UserError: the base has no documents, they were not drawn yet, or their vocab differs.
  """
  source = source_of(workdir)
  of_base, folder = find(source)
  if folder is not None:
    base = Base(of_base, folder)
  elif can_draw(of_base):
    base = to_draw(of_base, settings, workdir)
    if not is_complete(base.folder):
      raise UserError(
        f"{base.folder} does not have the documents of {source} yet: run `cm3leon prepare_base` "
        "with the same --config and --workdir first."
      )
  else:
    raise UserError(
      f"config.data.base_documents is {settings.data.base_documents}, but {source} has no "
      "documents: set it to 0, or give a workdir with documents/ and neighbors/ as --init_from."
    )
  if base.settings.vocab != settings.vocab:
    raise UserError(f"{source} has another config.vocab than this run: set the same values.")
  return base


def check_limit(settings: Settings) -> None:
  """Raises UserError if `train.max_forgetting` is set, but the run has no documents of its base."""
  if settings.train.max_forgetting and not settings.data.base_documents:
    raise UserError(
      f"config.train.max_forgetting is {settings.train.max_forgetting:g}, but the run has no "
      "documents of its base whose loss it could measure (config.data.base_documents is 0): set it "
      "to 0, or start from a base with documents (docs/finetune.md)."
    )


def ids(settings: Settings, workdir: epath.PathLike) -> dict[str, str]:
  """Returns the ids of the base's documents, on which a training depends; {} if it uses none.

  Raises:
    UserError: see `check_limit` and `open_base`.
  """
  check_limit(settings)
  if not settings.data.base_documents:
    return {}
  base = open_base(settings, workdir)
  return {f"base_{name}": stages.require(base.folder, name)["id"] for name in READ}

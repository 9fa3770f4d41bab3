"""Finds the documents of a base, the run or bundle that a tuning starts from.

A tuning run reads them for two reasons: replay of training documents reduces forgetting, and the
loss of held-out documents shows how much the tuned model forgets. A workdir has its documents. A
bundle has a sample of them, which `export.replay` writes: only pairs, no other documents.
"""

import dataclasses
from typing import Any

from etils import epath

from cm3leon_jax.config.settings import Settings
from cm3leon_jax.errors import UserError
from cm3leon_jax.files.json_files import read_json
from cm3leon_jax.run import bundles
from cm3leon_jax.run.source import Source
from cm3leon_jax.stages import from_data, stages

NAME = "base"  # Name of the source of these documents in rows and logs.
READ = ("documents", "neighbors")


@dataclasses.dataclass(frozen=True)
class Base:
  """A folder with the documents and neighbors of a base, and the base's settings."""

  settings: Settings
  folder: epath.Path


def is_complete(folder: epath.Path) -> bool:
  """Returns whether a folder has finished documents and neighbors."""
  return all((folder / name / stages.DONE).exists() for name in READ)


def copied_from(workdir: epath.PathLike) -> str:
  """Returns the base of a run, as the user named it; "" if nothing was copied from another run."""
  path = epath.Path(workdir) / "text_tokenizer" / stages.DONE
  result = read_json(path, {}).get("summary", {}).get("copied_from") if path.exists() else None
  return str(result or "")


def source_of(workdir: epath.PathLike) -> str:
  """Returns the base of a run, as the user named it.

  Raises:
    UserError: the tokenizers in `workdir` were not copied from another run.
  """
  if not (source := copied_from(workdir)):
    raise UserError(
      f"config.data.base_documents is set, but the tokenizers in {workdir} were not copied from "
      "another run: run `cm3leon copy_tokenizers --init_from=RUN` first, or set it to 0."
    )
  return source


def find(source: str) -> tuple[Settings, epath.Path | None]:
  """Returns the settings of a workdir or bundle, and the folder with its documents, if any.

  Raises:
    UserError: `source` is neither of them.
  """
  settings, folder = bundles.read_parent(source)
  if Source.of(source).kind == "bundle":
    data = dataclasses.replace(settings.data, text_share=0.0, interleaved_share=0.0)
    settings, folder = dataclasses.replace(settings, data=data), folder / bundles.REPLAY
  return settings, folder if is_complete(folder) else None


def fields(source: str, own_images: bool) -> dict[str, Any]:
  """Returns the config fields that a tuning has from its base, see `from_data.parent_fields`.

  If the run trains its own image tokenizer (`own_images`), the codes of the base's documents have
  no meaning for it, so it does not use them.
  """
  settings, folder = find(source)
  result = from_data.parent_fields(
    dataclasses.asdict(settings), not own_images and folder is not None
  )
  installed = bool(settings.vqgan.source)
  if own_images or installed:  # The batch must not be larger than the data.
    del result["vqgan.batch_size"]
  if own_images:  # Nothing is imported; the fields of an installed tokenizer mean nothing.
    result["vqgan.published"] = ""
  if own_images and installed:
    result = {k: v for k, v in result.items() if not k.startswith("vqgan.")}
    result["vqgan.source"] = ""
  return result


def open_parent(settings: Settings, workdir: epath.PathLike) -> Base:
  """Finds the documents of the base of the run in `workdir`.

  Raises:
    UserError: the base has no documents, or their vocab differs.
  """
  source = source_of(workdir)
  of_parent, folder = find(source)
  if folder is None:
    raise UserError(
      f"config.data.base_documents is {settings.data.base_documents}, but {source} has no "
      "documents: set it to 0, or start from a workdir with documents/ and neighbors/, or from a "
      "bundle with replay documents (docs/export.md)."
    )
  if of_parent.vocab != settings.vocab:
    raise UserError(f"{source} has another config.vocab than this run: set the same values.")
  return Base(of_parent, folder)


def check_limit(settings: Settings) -> None:
  """Raises UserError if `train.max_forgetting` is set, but the run has no documents of its base."""
  if settings.train.max_forgetting and not settings.data.base_documents:
    raise UserError(
      f"config.train.max_forgetting is {settings.train.max_forgetting:g}, but the run has no "
      "documents of its base whose loss it could measure (config.data.base_documents is 0): set it "
      "to 0, or start from a base with documents, with 4000 of them (docs/tuning.md)."
    )


def ids(settings: Settings, workdir: epath.PathLike) -> dict[str, str]:
  """Returns the ids of the base's documents, on which a training depends; {} if it uses none.

  Raises:
    UserError: see `check_limit` and `open_parent`.
  """
  check_limit(settings)
  if not settings.data.base_documents:
    return {}
  base = open_parent(settings, workdir)
  return {f"base_{name}": stages.require(base.folder, name)["id"] for name in READ}

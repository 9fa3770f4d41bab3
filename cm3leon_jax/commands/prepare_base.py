"""Provides documents of the base, which a tuning replays, and on which it measures forgetting.

  cm3leon prepare_base --config=own --workdir=W

The base is the run whose tokenizers `cm3leon copy_tokenizers --init_from=BASE` copied. If the base
is a workdir with documents, they are read from there, and this command writes nothing. A bundle
contains no training documents. If it was trained on a world, such as scenes, the world draws
`data.base_documents` training documents and 400 held-out documents in W/base.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cm3leon_jax.commands import common

if TYPE_CHECKING:
  from etils import epath

  from cm3leon_jax.settings import Settings


def main(settings: Settings, workdir: epath.Path) -> None:
  # Imported here, so that the flags of these commands are not flags of this one.
  from cm3leon_jax.commands import build_neighbors, encode_documents, prepare_data
  from cm3leon_jax.export import copies
  from cm3leon_jax.trained import base_documents
  from cm3leon_jax.trained.run import Run

  if not settings.data.base_documents:
    print("prepare_base: config.data.base_documents is 0; nothing is drawn.")
    return
  source = base_documents.source_of(workdir)
  of_base, folder = base_documents.find(source)
  if folder is None and base_documents.can_draw(of_base):
    drawn = base_documents.to_draw(of_base, settings, workdir)
    copies.copy_tokenizers(Run(drawn.folder, drawn.settings), source)
    for command in (prepare_data, encode_documents, build_neighbors):
      command.main(drawn.settings, drawn.folder)
  opened = base_documents.open_base(settings, workdir)
  print(f"prepare_base: the documents of {source} are in {opened.folder}.")


if __name__ == "__main__":
  common.run(main)

"""Removes documents from the bank of a run, so that they are never retrieved again.

  cm3leon bank remove --workdir=workdir/scenes --document=KEY

The weights of a model that trained on a document may still remember it. Nothing is rebuilt: every
search skips the documents in neighbors/removed.json. Servers and trainings read it at their start.
"""

from __future__ import annotations

from absl import flags
from etils import epath, epy

from cm3leon_jax.commands import common
from cm3leon_jax.errors import UserError, printable

with epy.lazy_imports():
  from cm3leon_jax.retrieval import removed
  from cm3leon_jax.run import bundles
  from cm3leon_jax.stages import stages

_DOCUMENT = flags.DEFINE_multi_string(
  "document", [], "Key of a document, e.g. from results.jsonl; may be given several times."
)


def main(action: str, workdir: epath.Path) -> None:
  if not _DOCUMENT.value:
    raise UserError(f"name a document to {action}: --document=KEY")
  if bundles.is_bundle(bundles.folder_of(workdir)):
    raise UserError(
      f"{workdir} is a bundle: remove the document from the bank of its run, and export it again."
    )
  stages.require(workdir, "neighbors")
  every = removed.remove(workdir / "neighbors", _DOCUMENT.value)
  count = len(removed.rows(workdir / "neighbors"))
  print(
    f"bank: never retrieved again: {', '.join(map(printable, every))}; with their copies and "
    f"crops, {count} documents. They stay in raw, documents and neighbors of {workdir}, and "
    "weights may remember them; bundles and exports made before are not changed."
  )


if __name__ == "__main__":
  common.run(main, config=False, actions=("remove",))

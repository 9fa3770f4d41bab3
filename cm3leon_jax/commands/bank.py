"""Removes documents from the bank of a run, so that they are never retrieved again.

  cm3leon bank remove --workdir=workdir/scenes --document=KEY
  cm3leon bank remove --workdir=workdir/scenes --document=KEY --erase

The weights of a model that trained on a document may still remember it. Every search skips the
documents in neighbors/removed.json. Servers and trainings read it at their start. --erase also
erases the document from the run's folder; a repeated command completes one that was killed.
"""

from __future__ import annotations

import functools

from absl import flags
from etils import epath, epy

from cm3leon_jax.commands import common
from cm3leon_jax.errors import UserError, printable

with epy.lazy_imports():
  from cm3leon_jax.retrieval import erased, removed
  from cm3leon_jax.run import source as source_lib
  from cm3leon_jax.stages import stages

_DOCUMENT = flags.DEFINE_multi_string(
  "document", [], "Key of a document, e.g. from results.jsonl; may be given several times."
)
_ERASE = flags.DEFINE_bool(
  "erase", False, "Also erase it from raw, documents and neighbors of the run, for good."
)


def main(action: str, workdir: epath.Path) -> None:
  if not _DOCUMENT.value:
    raise UserError(f"name a document to {action}: --document=KEY")
  if source_lib.Source.of(workdir).kind == "bundle":
    raise UserError(
      f"{workdir} is a bundle: remove the document from the bank of its run, and export it again."
    )
  stages.require(workdir, "neighbors")
  erase = functools.partial(erased.erase, workdir) if _ERASE.value else None
  every = removed.remove(workdir / "neighbors", _DOCUMENT.value, erase)
  where = f"raw, documents and neighbors of {workdir}"
  if erase is None:
    count = len(removed.rows(workdir / "neighbors"))
    said = f"never retrieved again: {', '.join(map(printable, every))}; with their copies and "
    said += f"crops, {count} documents. They stay in {where}"
  else:
    given, has_raw = ", ".join(map(printable, _DOCUMENT.value)), (workdir / "raw").exists()
    about = stages.require(workdir, "raw", config=dict)["config"]["raw"] if has_raw else {}
    said = f"erased from {where}, with copies and crops: {given}. The source "
    said += f"{about.get('source', '')}, samples and reports may still have them"
  print(
    f"bank: {said}, and weights may remember them; bundles and exports made before are not changed."
  )


if __name__ == "__main__":
  common.run(main, config=False, actions=("remove",))

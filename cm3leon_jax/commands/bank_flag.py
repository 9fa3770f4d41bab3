"""Defines --bank of generate, and opens the bank that it names."""

from __future__ import annotations

from absl import flags
from etils import epy

from cm3leon_jax.errors import UserError
from cm3leon_jax.stages import stages, table

with epy.lazy_imports():
  from cm3leon_jax.run import run
  from cm3leon_jax.run import source as source_lib

BANK = flags.DEFINE_string(
  "bank",
  None,
  "Another workdir, or a bundle, with the same tokenizers and CLIP, from which a --prompt "
  "retrieves documents.",
)


def bank_of(trained: run.Run) -> run.Run | None:
  """Returns the run that has the bank, or None. Checks the tokenizers and the CLIP of --bank."""
  settings = trained.settings
  if BANK.value is None:
    return trained if trained.bank else None
  source = source_lib.Source.of(BANK.value)
  folder = source.folder
  read = (*table.TOKENIZERS, *table.own_clip(settings))
  if source.kind == "bundle":
    bank = run.Run.open(folder)
    if bank.bank is None:
      raise UserError(f"--bank is {folder}, a bundle without documents: give one with documents.")
    found = {"clip": bank.settings.retrieval.clip, **run.ids(bank, read)}
    remedy = "give the bundle whose tokenizers and CLIP this run has, or a workdir"
  else:
    bank = run.Run(folder, settings)
    documents, neighbors = (
      stages.require(folder, name, config=dict)["config"] for name in ("documents", "neighbors")
    )
    found = {"clip": neighbors["retrieval"]["clip"], **documents["inputs"], **neighbors["inputs"]}
    remedy = f"copy its folder from {trained.folder} to {folder}, and build the bank again"
  expected = {"clip": settings.retrieval.clip, **run.ids(trained, read)}
  for name, value in expected.items():
    if found[name] != value:
      raise UserError(
        f"--bank {folder} was built with a different {name} than {trained.folder}: {remedy}."
      )
  return bank

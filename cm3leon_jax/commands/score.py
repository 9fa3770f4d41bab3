"""Measures the log-probability of each token of your documents under a trained model.

  cm3leon score --workdir=scenes --documents=my.jsonl
  cm3leon score --workdir=workdir/scenes --retrieve=1 \\
    --documents=workdir/scenes/documents/heldout_pairs

--workdir is the workdir of a run, the folder of a bundle, or the name of an installed bundle.
Without --config, the command uses the settings that are stored there. A line of a JSONL file is
{"text": ...}, {"image": path, "caption": ...} or {"segments": [...]}. The command writes
scores.jsonl, with a line for each document, and summary.json, with perplexity and bits per token
for text and for image codes. They go to scores/NAME-HASH/ in the workdir of a run, in the current
folder for a bundle, or in --out. docs/evaluation.md explains both files.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

from etils import epath, epy
from pydantic import Field

from cm3leon_jax.commands import common, shared_flags
from cm3leon_jax.config.settings import Settings
from cm3leon_jax.errors import UserError
from cm3leon_jax.files.digests import digest_of_json
from cm3leon_jax.files.json_files import read_json, write_json
from cm3leon_jax.stages import table

with epy.lazy_imports():
  from cm3leon_jax import distributed
  from cm3leon_jax.evaluation.likelihood import bits, document_files
  from cm3leon_jax.evaluation.likelihood import documents as documents_lib
  from cm3leon_jax.generation import pipeline, tasks
  from cm3leon_jax.retrieval import neighbors
  from cm3leon_jax.run import run


@dataclasses.dataclass(frozen=True)
class Flags(shared_flags.Files, shared_flags.Retrieve, shared_flags.Processes):
  documents: str | None = None
  """JSONL file of texts, pairs or interleaved documents (docs/evaluation.md), or the folder of a
  document store, e.g. workdir/documents/heldout_pairs."""
  seed: Annotated[int, Field(ge=0, le=2**31)] | None = None
  """Seed of the resamples for the intervals."""

  def check(self) -> None:
    if not self.documents:
      raise UserError("name the documents: --documents=my.jsonl")
    given = self.retrieve or ["0"]
    if len(given) > 1 or not given[0].isdecimal():
      raise UserError(f"--retrieve is '{','.join(given)}'; it must be one whole number, e.g. 1.")

  def number_of_neighbors(self, settings: Settings) -> int:
    """Returns the value of --retrieve. Raises UserError if it is too large."""
    number, most = int((self.retrieve or ["0"])[0]), settings.retrieval.max_candidates
    if number > most:
      raise UserError(
        f"--retrieve is {number}; at most config.retrieval.max_candidates = {most} can be "
        "retrieved."
      )
    return number


def main(settings: Settings, workdir: epath.Path, flags: Flags) -> None:
  trained = run.Run.open(workdir, settings)
  settings = trained.settings
  seed = settings.seed if flags.seed is None else flags.seed
  retrieve = flags.number_of_neighbors(settings)
  if retrieve and trained.bank is None:
    raise UserError(f"--retrieve is {retrieve}, but {trained.folder} has no bank: leave it out.")
  retrieval = ["documents", "neighbors", *table.own_clip(settings)] if retrieve else []
  inputs = run.ids(trained, dict.fromkeys([*table.TOKENIZERS, "train", *retrieval]))
  layout, path = tasks.PromptLayout.of(trained), epath.Path(flags.documents or "")
  with common.use_mesh(settings):
    with distributed.together():
      documents, digest = document_files.open_documents(
        path,
        layout,
        {name: inputs[name] for name in table.TOKENIZERS},
        trained.images,
        crop=settings.raw.crop,
        num_threads=settings.raw.num_threads,
        allow_outside=flags.allow_outside,
      )
    identity = {
      "inputs": inputs,
      "documents": {"name": path.name, "digest": digest},
      "retrieve": retrieve,
      "retrieval": table.identity(settings, "neighbors")["retrieval"] if retrieve else None,
      "num_resamples": settings.evaluation.num_resamples,
      "seed": seed,
    }
    distributed.check_same_config(identity)
    name = f"{tasks.slug(path.stem)}-{digest_of_json(identity)[:8]}"
    folder = flags.results_folder(trained) / "scores" / name
    with distributed.once(folder, identity) as summary:
      if summary is not None:
        summary.update(_score(trained, layout, documents, folder, retrieve, seed))
        if distributed.is_first():
          write_json(folder / documents_lib.SUMMARY, summary)
  if distributed.is_first():
    scores, name = folder / documents_lib.SCORES, documents_lib.SUMMARY
    print(f"score: {documents_lib.describe(read_json(folder / name))}.")
    print(f"score: each token is in {scores}, all numbers in {name} in that folder.", flush=True)


def _score(
  trained: run.Run,
  layout: tasks.PromptLayout,
  documents: document_files.Documents,
  folder: epath.Path,
  retrieve: int,
  seed: int,
) -> dict:
  """Scores the documents, and returns the content of summary.json."""
  settings = trained.settings
  config = settings.evaluation
  bits.check_batch(config)
  find = _search(trained, layout, retrieve) if retrieve else None
  params, step = trained.params(dtype=settings.model.dtype)
  sizes = (layout.positions, config.batch_size)
  scorer = documents_lib.Scorer(params, settings.model, settings.vocab, *sizes, find)
  resampling = {"num_resamples": config.num_resamples, "seed": seed}
  result = documents_lib.run(scorer, documents, folder, **resampling)
  return {"step": step, "retrieve": retrieve, **result}


def _search(trained: run.Run, layout: tasks.PromptLayout, count: int) -> documents_lib.Search:
  """Opens the bank and CLIP of the run, which find the neighbors of a document."""
  assert trained.bank is not None
  retriever = neighbors.Retriever(trained.bank / "neighbors", trained.settings.retrieval)
  return documents_lib.Search(
    count, retriever, pipeline.open_bank(layout, trained.bank), trained.clip, layout
  )


if __name__ == "__main__":
  common.run(main, Flags, config=None)

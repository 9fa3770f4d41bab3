"""Opens the training and held-out rows of a run from the folders of its stages."""

import dataclasses
import functools
import hashlib
import json
from typing import Any

from etils import epath

from cm3leon_jax import distributed
from cm3leon_jax.config.settings import Settings
from cm3leon_jax.data.documents.store import Bank, DocumentStore
from cm3leon_jax.data.instructions.rows import instruction_sources
from cm3leon_jax.data.rows.loader import NextPhase, RowLoader
from cm3leon_jax.data.rows.plan import RowPlan, RowSource
from cm3leon_jax.data.rows.plan_statistics import (
  describe,
  describe_loss,
  loss_statistics,
  plan_statistics,
  space_for_neighbors,
)
from cm3leon_jax.errors import UserError
from cm3leon_jax.retrieval.neighbors import load_neighbors
from cm3leon_jax.run import base_documents


def open_rows(
  settings: Settings, workdir: epath.Path, split: str, write_starts: bool = False
) -> RowLoader:
  """Opens the rows of a split.

  The rows contain instructions, pairs with their neighbors, texts and interleaved documents. In
  instructions, only the answers have a loss weight. `split` is "train" or "heldout". The held-out
  loss is computed on the rows of "heldout". Their neighbors are retrieved by the caption only, as
  at inference, and have no loss weight (`DataConfig.for_heldout`). They have the mixture of the
  first phase. `write_starts`, which exactly one process of a run sets, records in train/plan.jsonl
  where each window of the plan starts, for a later phase in train/plan_ROW_DIGEST.jsonl.

  Raises:
    UserError: a document store is empty, the neighbors do not match the documents, a task has the
      same name as a document source, or all training documents together are shorter than one batch.
  """
  phases = settings.phases() if split == "train" else settings.phases()[:1]
  mixtures: list[list[RowSource]] = []
  for _, one in phases:
    mixtures.append(_after(mixtures[-1] if mixtures else [], _sources(one, workdir, split)))
  sources = mixtures[-1]
  needed = settings.train.global_batch_size * settings.data.sequence_length
  # Every document has at least one token, so the first `needed` documents are enough.
  total = sum(int(s.store.lengths[:needed].sum(dtype="int64")) for s in sources)
  if split == "train" and total < needed:
    raise UserError(
      f"{workdir} has {total} training tokens, but one batch takes {needed} "
      "(train.global_batch_size x data.sequence_length): add documents or lower one of the two."
    )
  has_names = settings.instructions.any or any(base_share(one, split) for _, one in phases)

  def open_phase(k: int, before: RowLoader | None) -> RowLoader:
    first, one = phases[k]
    begin = before.plan.start_of_phase(first, len(mixtures[k])) if before else None
    data = one.data if split == "train" else one.data.for_heldout()
    starts = workdir / "train" / _starts_name(settings, k) if split == "train" else None
    plan = RowPlan(mixtures[k], data, one.vocab, one.seed, starts, write_starts, begin)
    following = None
    if k + 1 < len(phases):
      names = tuple(source.name for source in sources)
      opens = functools.partial(open_phase, k + 1)
      following = NextPhase(phases[k + 1][0], opens, names)
    return RowLoader(plan, one.vocab, one.model.align_images, has_names, following)

  return open_phase(0, None)


def _starts_name(settings: Settings, phase: int) -> str:
  """Returns the name of the file with the starts of a phase's windows, see `WindowStarts`."""
  if not phase:
    return "plan.jsonl"
  phases = settings.data.phases[:phase]
  digest = hashlib.sha256(json.dumps(phases, sort_keys=True).encode()).hexdigest()[:8]
  return f"plan_{phases[-1][0]}_{digest}.jsonl"


def _after(before: list[RowSource], sources: list[RowSource]) -> list[RowSource]:
  """Returns the sources of a phase in an order that begins with those of the phase before it."""
  new = {source.name: source for source in sources}
  kept = [new.pop(old.name, dataclasses.replace(old, share=0.0)) for old in before]
  return kept + [*new.values()]


def _sources(settings: Settings, workdir: epath.Path, split: str) -> list[RowSource]:
  of_parent = base_share(settings, split)
  share = (1 - of_parent) * replay_share(settings, split)
  of_instructions = (settings.instructions, workdir / "instructions", settings.vocab)
  sources = instruction_sources(*of_instructions, split, 1 - of_parent - share)
  documents = document_sources(settings, workdir, split, share) if share else []
  if of_parent:
    documents += _base_sources(settings, workdir, split, of_parent)
  if taken := {source.name for source in sources} & {source.name for source in documents}:
    raise UserError(
      f"config.instructions has a task with the name '{min(taken)}', which the logs use for "
      "documents: rename the task."
    )
  return sources + documents


def base_share(settings: Settings, split: str) -> float:
  """Returns the share of rows that documents of the base fill: half of the held-out rows."""
  data = settings.data
  if data.base_share and not data.base_documents:
    raise UserError(
      f"config.data.base_share is {data.base_share}, but config.data.base_documents is 0: set it "
      "in all commands of the run, from `cm3leon copy_tokenizers --init_from=RUN` on."
    )
  return data.base_share if split == "train" else 0.5 * bool(data.base_documents)


def _base_sources(
  settings: Settings, workdir: epath.Path, split: str, share: float
) -> list[RowSource]:
  """Opens the documents of the base as the sources "base" (pairs), "base_texts", ...

  See `document_sources`.
  """
  base, name = base_documents.open_parent(settings, workdir), base_documents.NAME
  return [
    dataclasses.replace(source, name=name if source.name == "pairs" else f"{name}_{source.name}")
    for source in document_sources(base.settings, base.folder, split, share)
    if source.share
  ]


def replay_share(settings: Settings, split: str) -> float:
  """Returns the share that documents fill of a run's rows, without the rows of the base.

  Instructions fill the remaining rows.

  Half of the held-out rows are documents and half are instructions, so that both held-out losses
  are computed on the same number of rows.
  """
  if not settings.instructions.any:
    return 1.0
  share = settings.instructions.replay_share
  return 0.5 if share and split == "heldout" else share


def document_sources(
  settings: Settings, workdir: epath.Path, split: str, share: float
) -> list[RowSource]:
  """Opens the documents of a split: pairs with their neighbors, texts, interleaved documents.

  `split` is "train" or "heldout". `share` is the total share of these documents in the rows.

  Raises:
    UserError: see `open_rows`.
  """
  documents, data = workdir / "documents", settings.data

  def store(name: str) -> DocumentStore:
    return DocumentStore(documents / name, settings.vocab)

  bank, pairs = Bank(documents, settings.vocab), store(f"{split}_pairs")
  ids = load_neighbors(
    workdir / "neighbors", f"{split}_pairs", text_only=split == "heldout", bank=len(bank)
  )
  if len(ids) != len(pairs):
    raise UserError(
      f"{workdir / 'neighbors'} has neighbors for {len(ids)} documents, but {pairs.folder} has "
      f"{len(pairs)} documents: run `cm3leon build_neighbors` again."
    )
  of_pairs = share * (1 - data.text_share - data.interleaved_share)
  sources = [RowSource(pairs, of_pairs, ids, bank, name="pairs")]
  for kind, of_kind in (("texts", data.text_share), ("interleaved", data.interleaved_share)):
    if of_kind > 0:
      sources.append(RowSource(store(f"{split}_{kind}"), share * of_kind, name=kind))
  for source in sources:
    if source.share > 0 and not len(source.store):
      raise UserError(
        f"{source.store.folder} has no documents: add some, or change config.data.text_share = "
        f"{data.text_share} and config.data.interleaved_share = {data.interleaved_share}; "
        "pairs have the remaining share."
      )
  return sources


def print_phases(settings: Settings) -> None:
  """Prints which fields each phase of the mixture sets."""
  for first, fields in settings.data.phases:
    values = ", ".join(f"{name} = {value}" for name, value in fields.items())
    distributed.print_once(f"rows: from row {first:,} on, {values}.")


def look_at_rows(plan: RowPlan) -> dict[str, Any]:
  """Prints and returns statistics of the plan's first window. Warns if no neighbor ever fits.

  If the plan has instructions, the statistics contain the `loss_statistics`.
  """
  for source in plan.sources:
    has_neighbors = source.share > 0 and source.bank is not None
    if has_neighbors and (sentence := space_for_neighbors(source, plan.config)):
      distributed.print_once(f"rows: {sentence}")
  statistics = plan_statistics(plan)
  tuned = any(source.instructions is not None for source in plan.sources)
  names = [source.name for source in plan.sources] if tuned else []
  distributed.print_once(f"rows: {describe(statistics, names)}")
  if tuned:
    statistics |= loss_statistics(plan)
    distributed.print_once(describe_loss(statistics, names))
  return statistics

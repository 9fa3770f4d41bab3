"""Trains the decoder; the same command continues a run that was stopped or killed.

python -m launch.train --config=ml_configs/openmoji.py --workdir=workdir
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from absl import flags

from cm3leon_jax import stages
from cm3leon_jax.commands import common
from cm3leon_jax.config import UserError
from cm3leon_jax.io import read_json, write_json

if TYPE_CHECKING:
  from cm3leon_jax.data.pipeline import RowLoader
  from cm3leon_jax.data.plan import RowPlan
  from cm3leon_jax.settings import Settings

_PROFILE_STEPS = flags.DEFINE_string(
  "profile_steps", "", "Steps to trace into train/profile, e.g. 10:13; both are traced."
)
_DEBUG_NANS = flags.DEFINE_bool(
  "debug_nans", False, "Stop at the operation that makes the first NaN. Slow."
)


def open_rows(settings: Settings, workdir, split: str, write_starts: bool = False) -> RowLoader:
  """The rows of `split`: pairs with neighbors from the training pairs, texts and interleaved documents, by their shares.

  Those of "heldout" are the rows of the held-out loss: neighbors are found by the caption alone, as
  at inference, and only the document's own targets have a weight (`DataConfig.for_heldout`).
  Those of train know where the windows of their plan start from train/plan.jsonl, which one process of a run keeps.
  """
  from cm3leon_jax.data.documents import DocumentStore
  from cm3leon_jax.data.pipeline import RowLoader
  from cm3leon_jax.data.plan import RowPlan, Source
  from cm3leon_jax.retrieval.neighbors import load_neighbors

  documents, data = workdir / "documents", settings.data
  store = lambda name: DocumentStore(documents / name, settings.vocab)
  bank = store("train_pairs")
  pairs = bank if split == "train" else store(f"{split}_pairs")
  ids = load_neighbors(workdir / "neighbors", f"{split}_pairs", text_only=split == "heldout")
  if len(ids) != len(pairs):
    raise UserError(
      f"{workdir / 'neighbors'} names neighbors of {len(ids)} documents, {pairs.folder} holds {len(pairs)}: build them anew."
    )
  sources = [Source(pairs, 1 - data.text_share - data.interleaved_share, ids, bank)]
  for kind, share in (("texts", data.text_share), ("interleaved", data.interleaved_share)):
    if share > 0:
      sources.append(Source(store(f"{split}_{kind}"), share))
  for source in sources:
    if source.share > 0 and not len(source.store):
      raise UserError(
        f"{source.store.folder} holds no documents: add some, or change config.data.text_share = {data.text_share} and "
        f"config.data.interleaved_share = {data.interleaved_share}, of which pairs get the rest."
      )
  data = settings.data if split == "train" else settings.data.for_heldout()
  starts = workdir / "train" / "plan.jsonl" if split == "train" else None
  plan = RowPlan(sources, data, settings.vocab.num_masks, settings.seed, starts, write_starts)
  needed = settings.train.global_batch_size * data.sequence_length
  total = sum(
    int(s.store.lengths[:needed].sum(dtype="int64")) for s in sources
  )  # No segment is empty: more is not needed.
  if split == "train" and total < needed:
    raise UserError(
      f"{documents} holds {total} training tokens, one batch takes {needed} "
      "(train.global_batch_size x data.sequence_length): add documents or lower one of the two."
    )
  return RowLoader(plan, settings.vocab)


def look_at_rows(plan: RowPlan) -> dict:
  """Prints what the plan's first window holds, and neighbors that never fit; returns the numbers."""
  from cm3leon_jax import distributed
  from cm3leon_jax.data.plan_statistics import describe, plan_statistics, room_for_neighbors

  for source in plan.sources:
    if (
      source.share > 0
      and source.bank is not None
      and (sentence := room_for_neighbors(source, plan.config))
    ):
      distributed.tell(f"rows: {sentence}")
  statistics = plan_statistics(plan)
  distributed.tell(f"rows: {describe(statistics)}")
  return statistics


def main(settings: Settings, workdir, profile_steps: str = "", debug_nans: bool = False) -> None:
  import jax

  from cm3leon_jax import distributed
  from cm3leon_jax.generation.heldout import sample_grids
  from cm3leon_jax.training.profile import parse_steps
  from cm3leon_jax.training.train import train

  traced = parse_steps(profile_steps, settings.train.steps)
  distributed.check_same_config(
    {**dataclasses.asdict(settings), "profile_steps": profile_steps, "debug_nans": debug_nans}
  )
  with distributed.together():  # Nobody writes before all have read.
    folder = workdir / "train"
    config = stages.run_config(settings, workdir, "train")
    if (folder / "config.json").exists():
      stages.check_same_config(folder, read_json(folder / "config.json")["run"], config)
  with distributed.together():
    if distributed.is_first():
      write_json(folder / "config.json", {"run": config, "settings": dataclasses.asdict(settings)})
  with distributed.together():
    if not (folder / "config.json").exists():
      raise UserError(
        f"--workdir {workdir} is another folder for some of the processes: put it where all of them reach it."
      )
  done = folder / stages.DONE
  redo = done.exists() and read_json(done)["summary"]["steps"] < settings.train.steps
  # A context, not jax.config.update: that ends without a word once anything like logsumexp is traced (jax 0.10.2).
  nans = jax.debug_nans(debug_nans or jax.config.jax_debug_nans)
  stage = stages.once(
    folder, config, redo, writes=distributed.is_first(), together=distributed.together
  )
  with common.use_mesh(settings), nans, stage as summary:
    if summary is None:
      return
    common.keep_compiled(workdir)
    with distributed.together():
      loader = open_rows(settings, workdir, "train", write_starts=distributed.is_first())
      heldout = open_rows(settings, workdir, "heldout")
      summary.update(rows=look_at_rows(loader.plan))
      generate_grid = sample_grids(settings, workdir, folder / "samples")
    result = train(
      folder,
      settings.model,
      settings.optimizer,
      settings.train,
      settings.vocab,
      loader,
      heldout,
      settings.seed,
      generate_grid,
      traced,
    )
    summary.update(result)
    distributed.tell(
      f"train: {result['steps']} steps, held-out image loss {result['heldout_image_loss']:.3f} nats per code."
    )


if __name__ == "__main__":
  common.run(
    lambda settings, workdir: main(settings, workdir, _PROFILE_STEPS.value, _DEBUG_NANS.value),
    several_processes=True,
  )

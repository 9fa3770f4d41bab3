"""Chooses held-out documents whose facts are known, equally many of each kind."""

from collections.abc import Sequence
import dataclasses

from etils import epath
import numpy as np

from cm3leon_jax.config import UserError
from cm3leon_jax.data.documents.store import DocumentStore
from cm3leon_jax.generation.heldout import HeldoutCaption, tasks_of_rows
from cm3leon_jax.generation.pipeline import Pipeline


def choose(facts: Sequence[dict], count: int, seed: int) -> list[int]:
  """Chooses documents, equally many of each category and kind of held-out, if there are enough.

  Args:
    facts: field `facts` of every held-out document; {} without facts.
    count: number of documents.
    seed: of the choice.

  Returns:
    `count` indices into `facts`; any first ones are spread in the same way.

  Raises:
    UserError: fewer documents have facts.
  """
  rng = np.random.default_rng([seed, len(facts)])
  groups: dict[tuple[str, str], list[int]] = {}
  for i in rng.permutation(len(facts)):
    if facts[i]:
      groups.setdefault((facts[i]["tag"], facts[i]["heldout"]), []).append(int(i))
  available = sum(map(len, groups.values()))
  if available < count:
    raise UserError(
      f"{count} held-out scenes are to be chosen, and {available} held-out documents have facts: "
      "lower config.evaluation.scenes, or prepare data with config.raw.source = 'scenes'."
    )
  ordered = [groups[key] for key in sorted(groups)]
  rounds = [[group[i] for group in ordered if i < len(group)] for i in range(count)]
  return [i for one_round in rounds for i in one_round][:count]


def heldout_captions(
  pipeline: Pipeline, workdir: epath.PathLike, weights: Sequence[float]
) -> list[HeldoutCaption]:
  """Returns tasks of held-out captions that have facts, guidance weight after guidance weight.

  `evaluation.scenes` captions are chosen by the seed (`choose`), all if it is 0.

  Args:
    pipeline: of the run; the evaluation, sampling and seed of its settings are used.
    workdir: of the run; its document stores and neighbors are read.
    weights: of guidance; equal ones count once.

  Raises:
    UserError: too few held-out documents have facts.
  """
  store = DocumentStore(epath.Path(workdir) / "documents" / "heldout_pairs", pipeline.layout.vocab)
  facts = [store[i].facts for i in range(len(store))]
  settings, tokenizer = pipeline.settings, pipeline.image_tokenizer
  config, seed = settings.evaluation, settings.seed
  rows = choose(facts, config.scenes or max(1, sum(map(bool, facts))), seed)
  columns = [
    (config.scene_neighbors, dataclasses.replace(settings.sampling, guidance=weight))
    for weight in dict.fromkeys(weights)
  ]
  return tasks_of_rows(pipeline.layout, workdir, rows, seed, columns, image_tokenizer=tokenizer)

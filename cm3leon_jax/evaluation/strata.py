"""Chooses held-out documents with known facts, equally many from each stratum."""

from collections.abc import Sequence
import dataclasses
import itertools

from etils import epath
import numpy as np

from cm3leon_jax.data.documents.store import DocumentStore
from cm3leon_jax.errors import UserError
from cm3leon_jax.generation.heldout import HeldoutCaption, tasks_of_rows
from cm3leon_jax.generation.pipeline import Pipeline


def choose(facts: Sequence[dict], count: int, seed: int) -> list[int]:
  """Chooses documents from the strata in turn.

  A stratum contains the documents with the same fields `tag` and `heldout` of their facts. `facts`
  contains the field `facts` of every held-out document: {} if they are unknown. Returns `count`
  indices into `facts`. The first indices, however many, are spread evenly over the strata.

  Raises:
    UserError: fewer than `count` documents have facts.
  """
  rng = np.random.default_rng([seed, len(facts)])
  groups: dict[tuple[str, str], list[int]] = {}
  for i in rng.permutation(len(facts)):
    if facts[i]:
      stratum = (str(facts[i].get("tag", "")), str(facts[i].get("heldout", "")))
      groups.setdefault(stratum, []).append(int(i))
  available = sum(map(len, groups.values()))
  if available < count:
    raise UserError(
      f"cannot choose {count} held-out captions, because only {available} held-out documents have "
      "facts: lower config.evaluation.captions, or prepare data whose records have `facts`."
    )
  ordered = [groups[key] for key in sorted(groups)]
  rounds = itertools.chain.from_iterable(itertools.zip_longest(*ordered))
  return [i for i in rounds if i is not None][:count]


def heldout_captions(
  pipeline: Pipeline, workdir: epath.PathLike, weights: Sequence[float]
) -> list[HeldoutCaption]:
  """Makes a task for each pair of a guidance weight and a chosen held-out caption.

  The tasks are sorted by weight, in the order of `weights`; duplicate weights are ignored. The seed
  chooses `evaluation.captions` captions with facts (see `choose`), or all if it is 0. The document
  stores and neighbors of `workdir` are read.

  Raises:
    UserError: too few held-out documents have facts.
  """
  store = DocumentStore(epath.Path(workdir) / "documents" / "heldout_pairs", pipeline.layout.vocab)
  facts = [store[i].facts for i in range(len(store))]
  settings, tokenizer = pipeline.settings, pipeline.image_tokenizer
  config, seed = settings.evaluation, settings.seed
  rows = choose(facts, config.captions or max(1, sum(map(bool, facts))), seed)
  columns = [
    (config.neighbors, dataclasses.replace(settings.sampling, guidance=weight))
    for weight in dict.fromkeys(weights)
  ]
  return tasks_of_rows(pipeline.layout, workdir, rows, seed, columns, image_tokenizer=tokenizer)

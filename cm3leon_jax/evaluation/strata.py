"""Chooses held-out documents whose facts are known, equally many of each kind."""

from collections.abc import Sequence

import numpy as np

from cm3leon_jax.config import UserError


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

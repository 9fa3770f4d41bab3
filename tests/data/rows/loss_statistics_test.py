import dataclasses

import numpy as np
import pytest

from cm3leon_jax.config.data import DataConfig
from cm3leon_jax.data.instructions.samples import Drops
from cm3leon_jax.data.rows.loader import RowLoader
from cm3leon_jax.data.rows.plan import RowPlan
from cm3leon_jax.data.rows.plan_statistics import describe_loss, loss_statistics, plan_statistics
from cm3leon_jax.run.rows import look_at_rows
from tests.data.stores import VOCAB, make_instructions, make_sources

NAMES = ("answers", "edits", "pairs", "texts")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
  folder = tmp_path_factory.mktemp("stores")
  found = [*make_instructions(folder), *make_sources(folder)]
  return [dataclasses.replace(x, share=0.25, name=name) for x, name in zip(found, NAMES)]


def changed(sources, **fields):
  """Returns sources whose instructions have other fields."""
  return [
    dataclasses.replace(x, instructions=dataclasses.replace(x.instructions, **fields))
    if x.instructions
    else x
    for x in sources
  ]


def plan_of(sources, **fields):
  config = DataConfig(sequence_length=128, pack_window=64, mean_spans=2.0, **fields)
  return RowPlan(sources, config, VOCAB, 0)


def counted_in_rows(plan, windows):
  """Counts the loss in the tokens of the rows; `loss_statistics` reads only lengths."""
  loader = RowLoader(plan, VOCAB, mark_sources=True)
  rows = [loader[i] for i in range(sum(len(plan.window(w)) for w in range(windows)))]
  numbers, weights = (np.concatenate([row[x] for row in rows]) for x in ("sources", "loss_weights"))
  filled, targets, loss = (
    np.bincount(numbers, values, 5)[1:] for values in (numbers > 0, weights > 0, weights)
  )
  return targets / filled, loss / loss.sum(), loss.sum() / len(rows)


@pytest.mark.parametrize("loss_on", ["all", "target"])
def test_the_loss_of_sources_is_that_of_their_rows(sources, loss_on):
  answers = changed(sources[:1], loss_on=loss_on, loss_weight=5.0)
  others = changed(sources[1:], loss_on=loss_on, drops=Drops(0.3, 0.3))
  plan = plan_of([*answers, *others], neighbor_loss_weight=0.25, condition_dropout=0.3)
  found = loss_statistics(plan, windows=3)
  targets, shares, per_row = counted_in_rows(plan, 3)
  assert found["target_shares"] == pytest.approx(targets.tolist())
  assert found["loss_shares"] == pytest.approx(shares.tolist())
  assert found["weight_per_row"] == pytest.approx(per_row)
  assert sum(found["loss_shares"]) == pytest.approx(1)


def test_the_table_in_literals():
  statistics = {
    "source_shares": [0.25, 0.75],
    "target_shares": [0.2, 1.0],
    "loss_shares": [0.25, 0.75],
  }
  assert describe_loss(statistics, ["count", "pairs"]).split("\n") == [
    "source  positions  with a loss  loss weight",
    "count       25.0%        20.0%        25.0%",
    "pairs       75.0%       100.0%        75.0%",
  ]


def test_only_a_run_with_instructions_prints_the_table(sources, capsys):
  plan = plan_of(sources)
  found = look_at_rows(plan)
  assert found == {**plan_statistics(plan), **loss_statistics(plan)}
  assert describe_loss(found, NAMES) in capsys.readouterr().out
  alone = [dataclasses.replace(source, share=0.5) for source in sources[2:]]
  assert "loss_shares" not in look_at_rows(plan_of(alone))
  assert "with a loss" not in capsys.readouterr().out

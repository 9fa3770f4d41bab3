import dataclasses

import numpy as np
import pytest

from cm3leon_jax.data.rows.loader import RowLoader
from cm3leon_jax.reports import row_contents
from tests.data.stores import VOCAB, make_plan, make_sources
from tests.refusals import refused


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
  return make_sources(tmp_path_factory.mktemp("stores"))


@pytest.fixture(scope="module")
def scores(sources):
  """Returns, for each document i, the scores of its candidates n: i + n / 10."""
  shape = sources[0].neighbors.shape
  return (np.arange(shape[0])[:, None] + np.arange(shape[1])[None] / 10).astype(np.float32)


def views_of(loader, scores, count):
  rows = [row_contents.read_row(loader, scores, number) for number in range(count)]
  return [view for row in rows for view in row.samples]


def test_rows_of_every_kind_are_read_and_named(sources, scores):
  loader = RowLoader(make_plan(sources), VOCAB)
  views = views_of(loader, scores, 60)
  assert any(view.dropped for view in views)
  assert any(part.moved and part.kind == "image" for view in views for part in view.parts)
  assert any(part.moved and part.kind == "text" for view in views for part in view.parts)
  assert any(view.origin.piece_start for view in views)
  assert {len(view.origin.neighbors) for view in views} == {0, 2}
  store = sources[0].store
  keys = {store[i].key: i for i in range(len(store))}
  for view in views:
    for neighbor in view.origin.neighbors:
      i = keys[view.origin.document.key]
      assert neighbor.document.key == store[int(sources[0].candidates(i)[neighbor.rank - 1])].key
      assert neighbor.score == pytest.approx(i + (neighbor.rank - 1) / 10)
      assert neighbor.candidates == (2 if i % 7 == 0 else 4)


def test_rows_without_space_are_read_too(sources, scores):
  loader = RowLoader(make_plan(sources, sequence_length=20, text_share=0.5), VOCAB)
  views = views_of(loader, scores, 200)
  assert any(view.missing for view in views)


def test_aligned_rows_are_read_if_they_are_planned(sources, scores):
  plan = make_plan(sources, num_neighbors=2, sequence_length=100)
  loader = RowLoader(plan, VOCAB, align_images=True)
  views = views_of(loader, scores, 40)
  assert min(view.sample.positions.min() for view in views) < 0
  number = next(i for i in range(40) if (loader[i]["positions"] < 0).any())
  aligned = loader[number]["positions"]
  with refused(ValueError):
    row_contents.read_row(Changed(plan, lambda row: row.update(positions=aligned)), scores, number)


class Changed(RowLoader):
  def __init__(self, plan, change):
    super().__init__(plan, VOCAB)
    self._change = change

  def __getitem__(self, i):
    row = super().__getitem__(i)
    self._change(row)
    return row


def swap_codes(row):
  at = np.flatnonzero(VOCAB.is_image(row["inputs"][:-1]) & VOCAB.is_image(row["inputs"][1:]))[0]
  row["inputs"][[at, at + 1]] = row["inputs"][[at + 1, at]]
  row["targets"][[at - 1, at]] = row["targets"][[at, at - 1]]


def merge_samples(row):
  """Sets the segment ids such that the first two samples become one."""
  second = row["segment_ids"] == 2
  row["segment_ids"][row["segment_ids"] >= 2] -= 1
  row["positions"][second] += int((row["segment_ids"] == 1).sum() - second.sum())
  row["targets"][np.flatnonzero(second)[0] - 1] = VOCAB.eos


@pytest.mark.parametrize(
  "change", [swap_codes, merge_samples, lambda row: row["positions"].__iadd__(1)]
)
def test_a_row_without_its_planned_samples_is_refused(sources, scores, change):
  plan = make_plan(sources, mean_spans=0.0)
  number = next(
    i
    for i in range(60)
    if len(plan.row(i)) > 1 and VOCAB.is_image(RowLoader(plan, VOCAB)[i]["inputs"]).any()
  )
  assert row_contents.read_row(RowLoader(plan, VOCAB), scores, number)
  with refused(ValueError):
    row_contents.read_row(Changed(plan, change), scores, number)


def test_another_store_than_the_rows_came_from_is_refused(sources, scores, tmp_path):
  plan, other = make_plan(sources), make_sources(tmp_path, seed=1)
  loader = RowLoader(plan, VOCAB)
  row = loader[0]
  replaced = [dataclasses.replace(a, store=b.store, bank=b.bank) for a, b in zip(sources, other)]
  broken = Changed(plan, lambda changed: changed.update(row))
  broken.plan = make_plan(replaced)
  with refused(ValueError):
    row_contents.read_row(broken, scores, 0)

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from benchmarks.speed.data import LengthStore, synthetic_sources
from cm3leon_jax.config.data import DataConfig
from cm3leon_jax.data.rows.loader import RowLoader
from cm3leon_jax.data.rows.plan import RowPlan, RowSource, pack_best_fit
from cm3leon_jax.data.rows.plan_statistics import describe, plan_statistics, space_for_neighbors
from cm3leon_jax.data.rows.units import Units
from cm3leon_jax.errors import UserError
from cm3leon_jax.vocab import VocabLayout
from tests.data.stores import VOCAB, make_plan, make_sources
from tests.refusals import refused


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
  return make_sources(tmp_path_factory.mktemp("stores"))


def test_pack_best_fit_literal():
  assert pack_best_fit([3, 6, 4, 2], 8) == [[1, 3], [2, 0]]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 50), max_size=80))
def test_packing_places_everything_once_and_overfills_no_row(lengths):
  rows = pack_best_fit(lengths, 50)
  assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
  assert all(sum(lengths[i] for i in row) <= 50 for row in rows)


@pytest.mark.parametrize(
  "fields",
  [{}, {"neighbor_sampling": "uniform"}, {"neighbor_sampling": "paper", "num_neighbors": 3}],
)
def test_plans_follow_from_seed_source_pass_and_unit(sources, fields):
  plan = make_plan(sources, sequence_length=256, **fields)
  plans = [plan.plan(0, pass_, unit) for pass_ in (0, 1) for unit in range(50)]
  again = make_plan(sources, sequence_length=256, pack_window=8, **fields)
  backwards = [again.plan(0, pass_, unit) for pass_ in (1, 0) for unit in reversed(range(50))]
  assert backwards[::-1] == plans
  assert plans[:50] != plans[50:]
  assert [
    make_plan(sources, seed=1, sequence_length=256, **fields).plan(0, 0, unit) for unit in range(50)
  ] != plans[:50]


@pytest.mark.parametrize("sampling", ["fixed", "paper", "uniform"])
def test_heldout_rows_have_the_best_neighbors_and_nothing_random(sources, sampling):
  config = DataConfig(neighbor_sampling=sampling, num_neighbors=3).for_heldout()
  plans = [
    make_plan(sources, seed, **vars(config)).plan(0, 0, unit)
    for seed in (0, 1)
    for unit in range(50)
  ]
  assert plans[:50] == plans[50:]
  assert {(p.neighbors, p.dropped, p.spans) for p in plans} == {
    ((0, 1, 2), False, ()),
    ((0, 1), False, ()),
  }


def test_typical_neighbors_that_do_not_fit_are_reported():
  paper = DataConfig(neighbor_sampling="paper", num_neighbors=3)
  pairs, _ = synthetic_sources(2_000, 1_024)
  assert space_for_neighbors(pairs, paper) == (
    "3 neighbors of typically 1,050 tokens and a document of 1,050 do not fit into 4,096 "
    "positions: only 2 neighbors fit, and rows omit the others."
  )
  assert space_for_neighbors(pairs, DataConfig(num_neighbors=2)) == ""
  assert space_for_neighbors(synthetic_sources(2_000, 256)[0], paper) == ""


def test_row_is_the_same_whatever_was_read_before(sources):
  forward, backward = make_plan(sources), make_plan(sources)
  rows = [forward.row(i) for i in range(150)]
  assert [backward.row(i) for i in reversed(range(150))] == rows[::-1]
  assert make_plan(sources, seed=1).row(0) != rows[0]


def test_row_is_the_same_on_any_number_of_readers(sources):
  rows = [make_plan(sources).row(i) for i in range(0, 60, 9)]
  shared = make_plan(sources)
  with ThreadPoolExecutor(8) as pool:
    assert list(pool.map(shared.row, range(60)))[::9] == rows
  parts = [make_plan(sources) for _ in range(3)]
  assert [parts[i % 3].row(i) for i in range(60)][::9] == rows


def store_of(documents) -> LengthStore:
  """Makes a store of lengths; `documents` has (length, is_image) per segment, per document."""
  segments = [s for document in documents for s in document]
  lengths, is_image = (
    np.array([n for n, _ in segments], np.int32),
    np.array([i for _, i in segments], bool),
  )
  return LengthStore(np.cumsum([0, *map(len, documents)]), lengths, is_image)


SEGMENT = st.tuples(st.integers(1, 70), st.booleans())


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(SEGMENT, min_size=1, max_size=3), max_size=12), st.integers(2, 30))
def test_units_are_whole_documents_and_pieces_of_single_texts(documents, length):
  units, store = Units(store_of(documents), length), store_of(documents)
  expected = []
  for i, document in enumerate(documents):
    single_text = len(document) == 1 and not document[0][1]
    starts = range(0, document[0][0], length - 1) if single_text else [0]
    expected += [
      (
        i,
        start,
        [min(document[0][0] - start, length - 1)] if single_text else [n for n, _ in document],
      )
      for start in starts
    ]
  assert [(*units.locate(u), units.lengths(store, u)[0]) for u in range(len(units))] == expected


def test_units_in_literals():
  units = Units(store_of([[(3, False)], [(9, False)]]), 5)
  assert [units.locate(unit) for unit in range(len(units))] == [(0, 0), (1, 0), (1, 4), (1, 8)]


def test_shares_are_shares_of_positions(sources):
  plan = make_plan(sources)
  filled = Counter()
  for i in range(400):
    for sample in plan.row(i):
      filled[sample.source] += sample.num_positions
  assert abs(filled[1] / filled.total() - 0.3) < 0.02


def test_loader_and_planner_agree_on_every_length(sources):
  plan = make_plan(sources)
  loader = RowLoader(plan, VOCAB)
  for i in range(200):
    row = loader[i]
    lengths = np.bincount(row["segment_ids"])[1:]
    assert lengths.tolist() == [s.num_positions for s in plan.row(i)]


@pytest.fixture
def planned(monkeypatch):
  """Returns a list that collects the windows that any `RowPlan` plans, in order."""
  windows, plan_window = [], RowPlan._plan_window
  monkeypatch.setattr(
    RowPlan,
    "_plan_window",
    lambda self, window: (windows.append(window), plan_window(self, window)),
  )
  return windows


def plan_with_starts(sources, path, seed=0, writes=True) -> RowPlan:
  return RowPlan(
    sources, DataConfig(sequence_length=128, pack_window=64), VOCAB, seed, path, writes
  )


def test_known_starts_leave_one_window_to_plan(sources, tmp_path, planned):
  path = tmp_path / "run" / "plan.jsonl"
  first = plan_with_starts(sources, path)
  rows = [first.row(i) for i in range(160)]
  last = planned[-1]
  assert planned == list(range(last + 1))
  assert len(path.read_text().splitlines()) == last + 2
  for i, window in ((159, last), (first._starts[last // 2].first_row, last // 2)):
    planned.clear()
    assert plan_with_starts(sources, path, writes=False).row(i) == rows[i]
    assert planned == [window]
  planned.clear()
  assert make_plan(sources).row(159) == rows[159]
  assert planned == list(range(last + 1))


def test_starts_are_appended_where_they_ended(sources, tmp_path, planned):
  whole, path = tmp_path / "whole.jsonl", tmp_path / "plan.jsonl"
  plan_with_starts(sources, whole).window(4)
  plan_with_starts(sources, path).window(2)
  plan_with_starts(sources, path, writes=False).window(4)
  assert len(path.read_text().splitlines()) == 4
  plan_with_starts(sources, path).window(4)
  assert path.read_text() == whole.read_text()


@pytest.mark.parametrize(
  ("kept", "again"), [(-1, [4]), (-2, [4]), (-20, [4]), (25, [0, 1, 2, 3, 4])]
)
def test_a_last_line_cut_short_costs_its_window(sources, tmp_path, planned, kept, again):
  """Also if the file has only a part of its first line."""
  path = tmp_path / "plan.jsonl"
  plan_with_starts(sources, path).window(4)
  whole = path.read_text()
  path.write_text(whole[:kept])
  planned.clear()
  rows = plan_with_starts(sources, path).window(4)
  assert planned == again
  assert rows == make_plan(sources).window(4)
  assert path.read_text() == whole


@pytest.mark.parametrize("other", ["seed", "neighbors", "config"])
def test_starts_of_another_plan_are_refused(sources, tmp_path, other):
  path, pairs = tmp_path / "plan.jsonl", sources[0]
  if other == "config":
    config = DataConfig(sequence_length=128, pack_window=64, mean_spans=2.0)
    RowPlan(sources, config, VOCAB, 0, path, True).window(4)
  elif other == "neighbors":
    plan_with_starts(
      [RowSource(pairs.store, pairs.share, pairs.neighbors[::-1], pairs.bank), sources[1]], path
    ).window(4)
  else:
    plan_with_starts(sources, path, seed=1).window(4)
  before = path.read_text()
  with refused(UserError, "plan.jsonl", "other rows"):
    plan_with_starts(sources, path)
  assert path.read_text() == before
  path.unlink()
  assert plan_with_starts(sources, path).window(4) == make_plan(sources).window(4)


# Name of a change -> (function that changes the lines, number of the first wrong line, from 1).
WRONG = {
  "last changed": (lambda x: [*x[:-1], x[-1].replace('"first_row": ', '"first_row": 1')], 6),
  "digest gone": (lambda x: [*x[:3], x[3].partition(', "digest"')[0] + "}", *x[4:]], 4),
  "missing": (lambda x: [*x[:3], *x[4:]], 4),
  "junk": (lambda x: [*x[:4], "\0\0", *x[5:]], 5),
}


@pytest.mark.parametrize("how", WRONG)
def test_a_line_that_the_run_did_not_write_is_named(sources, tmp_path, planned, how):
  path = tmp_path / "plan.jsonl"
  rows = plan_with_starts(sources, path).window(4)
  whole = path.read_text()
  change, number = WRONG[how]
  lines = change(whole.splitlines())
  path.write_text("\n".join(lines) + "\n")
  for writes in (True, False):
    with refused(UserError, f"line {number} changed"):
      plan_with_starts(sources, path, writes=writes)
  # Does what the message says: delete the wrong line and all lines after it.
  path.write_text("\n".join(lines[: number - 1]) + "\n")
  planned.clear()
  assert plan_with_starts(sources, path).window(4) == rows
  assert path.read_text() == whole


@pytest.mark.parametrize(("codes", "least"), [(256, 0.97), (1_024, 0.90)])
def test_the_default_mixture_fills_rows(codes, least):
  plan = RowPlan(synthetic_sources(20_000, codes), DataConfig(pack_window=4_096), VocabLayout(), 0)
  statistics = plan_statistics(plan)
  assert statistics["fill"] >= least
  assert statistics["source_shares"] == pytest.approx([0.3, 0.7], abs=0.01)


def test_statistics_count_what_the_rows_hold(sources):
  plan = make_plan(sources, sequence_length=80)
  counted = plan_statistics(plan, windows=2)
  rows = [*plan.window(0), *plan.window(1)]
  samples = [s for row in rows for s in row]
  plans = [plan.plan(*s[:3]) for s in samples if s.source == 0]
  assert (counted["windows"], counted["rows"], counted["samples"]) == (2, len(rows), 128)
  assert counted["fill"] == sum(s.num_positions for s in samples) / (len(rows) * 80)
  assert counted["samples_per_row"] == 128 / len(rows)
  assert counted["neighbors_per_sample"] == np.mean([len(p.neighbors) for p in plans])
  assert counted["condition_drops"] == np.mean([p.dropped for p in plans])
  assert counted["too_few_candidates"] == np.mean([p.missing > 0 for p in plans]) == 0
  assert counted["neighbors_crowded_out"] > 0
  assert f"{len(rows)} rows, {counted['fill']:.1%} of positions filled" in describe(counted)
  few = RowSource(sources[0].store, 0.7, sources[0].neighbors[:, :1], sources[0].bank)
  assert plan_statistics(make_plan([few, sources[1]]), windows=20)[
    "too_few_candidates"
  ] == pytest.approx(0.81, abs=0.06)

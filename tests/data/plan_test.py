from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from cm3leon_jax.data.cm3 import OVERHEAD
from cm3leon_jax.data.pipeline import RowLoader
from cm3leon_jax.data.plan import DataConfig, joined_length, pack_best_fit, plan_sample
from tests.data.stores import IMAGE_TOKENS, VOCAB, make_plan, make_sources


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
  return make_sources(tmp_path_factory.mktemp("stores"))


def test_pack_best_fit_literal():
  assert pack_best_fit([3, 6, 4, 2], 8) == [[1, 3], [2, 0]]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 50), max_size=80))
def test_packing_places_everything_once_and_overfills_no_row(slots):
  rows = pack_best_fit(slots, 50)
  assert sorted(i for row in rows for i in row) == list(range(len(slots)))
  assert all(sum(slots[i] for i in row) <= 50 for row in rows)


def test_packing_fills_rows():
  slots = np.random.default_rng(0).integers(5, 300, 2_000).tolist()
  assert sum(slots) / (len(pack_best_fit(slots, 1_024)) * 1_024) > 0.97


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 40), st.lists(st.integers(1, 30), max_size=4), st.integers(20, 120))
def test_a_sample_never_exceeds_the_row(seed, caption, neighbor_captions, length):
  config = DataConfig(sequence_length=length, mean_spans=3.0)
  candidates = [np.array([n, IMAGE_TOKENS]) for n in neighbor_captions]
  document = np.array([caption, IMAGE_TOKENS])
  plan = plan_sample(document, np.array([False, True]), candidates, np.random.default_rng(seed), config, 27)
  assert plan.length <= length + 1
  if not plan.dropped and plan.length <= length:
    joined = [n for i in plan.neighbors for n in candidates[i]] + document.tolist()
    assert plan.length == joined_length(joined) + OVERHEAD * len(plan.spans)
  if plan.spans:  # Spans are only drawn where all of them fit whole: an infill is never cut.
    joined = [n for i in plan.neighbors for n in candidates[i]] + document.tolist()
    assert joined_length(joined) + OVERHEAD * len(plan.spans) <= length + 1


def test_neighbours_go_before_spans_and_spans_before_the_tail():
  whole = {"neighbor_dropout": 0.0, "condition_dropout": 0.0, "mean_spans": 50.0}
  plan = lambda length: plan_sample(
    np.array([4, 16]), np.array([False, True]), [np.array([4, 16])] * 2, np.random.default_rng(1),
    DataConfig(sequence_length=length, **whole), 2,
  )  # fmt: skip
  everything = plan(1_000)
  assert (len(everything.neighbors), len(everything.spans) > 0) == (2, True)
  assert (len(plan(60).neighbors), len(plan(60).spans) > 0) == (1, True)
  assert (len(plan(30).neighbors), len(plan(30).spans) > 0) == (0, True)
  assert plan(22) == ((), False, (), 23)
  assert plan(10) == ((), False, (), 11)


def test_rates_of_drops(sources):
  plan = make_plan(sources, sequence_length=256)
  plans = [plan.plan(0, p, u) for p in range(60) for u in range(50)]
  dropped = np.mean([p.dropped for p in plans])
  alone = np.mean([not p.neighbors and not p.dropped for p in plans])
  assert abs(dropped - 0.09) < 0.02
  assert abs(alone - 0.10) < 0.02


def test_row_is_the_same_whatever_was_read_before(sources):
  forward, backward = make_plan(sources), make_plan(sources)
  rows = [forward.row(i) for i in range(150)]
  assert [backward.row(i) for i in reversed(range(150))] == rows[::-1]
  assert make_plan(sources, seed=1).row(0) != rows[0]


def test_row_is_the_same_on_any_number_of_readers(sources):
  rows = [make_plan(sources).row(i) for i in range(120)]
  shared = make_plan(sources)
  with ThreadPoolExecutor(8) as pool:
    assert list(pool.map(shared.row, range(120))) == rows
  for readers in (2, 4):
    parts = [make_plan(sources) for _ in range(readers)]
    assert [parts[i % readers].row(i) for i in range(120)] == rows


def test_a_pass_holds_every_document_once(sources):
  plan = make_plan(sources)
  counts = Counter()
  for i in range(400):
    counts.update((s.source, s.pass_, s.unit) for s in plan.row(i))
  assert set(counts.values()) == {1}
  for source in (0, 1):
    for pass_ in range(2):
      assert {u for s, p, u in counts if (s, p) == (source, pass_)} == set(range(len(plan.units[source])))


def test_long_texts_are_cut_into_pieces_that_cover_them(sources):
  plan = make_plan(sources)
  units, store = plan.units[1], sources[1].store
  covered = Counter()
  for unit in range(len(units)):
    document, _ = units.locate(unit)
    covered[document] += int(units.lengths(store, unit)[0][0])
  assert covered == {i: int(store.segment_lengths(i)[0][0]) for i in range(len(store))}
  assert len(units) > len(store)


def test_shares_are_shares_of_slots(sources):
  plan = make_plan(sources)
  slots = Counter()
  for i in range(400):
    for sample in plan.row(i):
      slots[sample.source] += sample.slots
  assert abs(slots[1] / slots.total() - 0.3) < 0.02


def test_loader_and_planner_agree_on_every_length(sources):
  plan = make_plan(sources)
  loader = RowLoader(plan, VOCAB)
  for i in range(200):
    row = loader[i]
    lengths = np.bincount(row["segment_ids"])[1:]
    assert lengths.tolist() == [s.slots for s in plan.row(i)]


@pytest.mark.parametrize(("field", "value"), [("text_share", 1.5), ("sequence_length", 0), ("num_neighbors", -1)])
def test_config_names_the_field_out_of_range(field, value):
  with pytest.raises(ValueError, match=field):
    DataConfig(**{field: value})

import dataclasses

from grain.experimental import index_shuffle
from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from benchmarks.speed.data import LengthStore
from cm3leon_jax.config.data import DataConfig
from cm3leon_jax.data.rows.plan import RowPlan, RowSource
from cm3leon_jax.data.rows.random_streams import RandomStreams, SampleGenerators, shuffled
from tests.data.stores import VOCAB, make_plan, make_sources


def make_store(rng: np.random.Generator, documents: int, longest: int) -> LengthStore:
  """Makes documents of 1 to 5 segments; some are one long text, some one image."""
  counts = rng.integers(1, 6, documents)
  is_image = rng.random(counts.sum()) < 0.4
  texts = rng.integers(1, longest + 1, counts.sum()) * rng.choice(
    [1, 20], counts.sum(), p=[0.9, 0.1]
  )
  lengths = np.where(is_image, 16, texts).astype(np.int32)
  return LengthStore(np.cumsum([0, *counts]), lengths, is_image)


class TwoParts:
  """A bank of two stores."""

  def __init__(self, *parts):
    self.parts = parts

  def segment_lengths(self, document):
    first = len(self.parts[0])
    part, document = (0, document) if document < first else (1, document - first)
    return self.parts[part].segment_lengths(document)


@settings(max_examples=15, deadline=None)
@given(
  st.integers(0, 2**32 - 1),
  st.sampled_from(["cm3leon", "chameleon"]),
  st.sampled_from([1, 29]),
  st.sampled_from([24, 100, 400, 2_000]),
  st.sampled_from(["fixed", "paper", "uniform", "best"]),
  st.integers(0, 4),
  st.sampled_from([0.0, 1.0, 4.0, 9.9, 15.0]),
  st.tuples(*[st.sampled_from([0.0, 0.3, 1.0])] * 3),
)
def test_arrays_compute_the_length_of_every_sample(
  seed, template, longest, length, sampling, neighbors, mean_spans, rates
):
  rng = np.random.default_rng(seed)
  store, bank = (
    make_store(rng, 40, longest),
    TwoParts(make_store(rng, 20, 29), make_store(rng, 10, 2)),
  )
  source = RowSource(store, 0.6, rng.integers(-1, 30, (40, 5)).astype(np.int32), bank)
  dropout, whole, condition = rates
  config = DataConfig(
    sequence_length=length,
    pack_window=100,
    neighbor_sampling=sampling,
    num_neighbors=3 if sampling == "paper" else neighbors,
    mean_spans=mean_spans,
    neighbor_dropout=dropout,
    whole_segment_rate=whole,
    condition_dropout=condition,
  )
  vocab = dataclasses.replace(VOCAB, num_special=int(rng.integers(8, 30)), template=template)
  plan = RowPlan([source, RowSource(make_store(rng, 30, longest), 0.4)], config, vocab, seed)
  rows = plan.window(1)
  assert {sample.source for row in rows for sample in row} == {0, 1}
  for sample in (sample for row in rows for sample in row):
    assert sample.num_positions == plan.plan(*sample[:3]).length - 1


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(0, 2**40), st.floats(0, 9.9))
def test_streams_draw_what_generators_of_numpy_draw(word, unit, mean):
  key = np.array([word, word ^ 12_345], np.uint64)
  rng = SampleGenerators().at(key, unit)
  streams, row = RandomStreams(key[None].repeat(2, 0), np.array([unit + 1, unit])), np.array([1])
  for count in (1, 3, 7, 2, 20):
    assert streams.random(row) == rng.random()
    assert streams.integers(row, count) == rng.integers(count + 1)
    expected = rng.permutation(count)
    assert streams.permutations(row, np.array([count]), 20)[0, :count].tolist() == expected.tolist()
    assert streams.poisson(row, mean) == rng.poisson(mean)


@pytest.mark.parametrize("size", [1, 2, 100, 4_096, 65_537, 10**6, 2**30 + 1])
@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
def test_units_have_the_order_of_index_shuffle(size, seed):
  places = np.unique(np.linspace(0, size - 1, 50).astype(np.int64))
  assert shuffled(places, size, seed).tolist() == [
    index_shuffle(i, size - 1, seed, 4) for i in places.tolist()
  ]


def test_an_error_of_the_planning_thread_reaches_the_reader(tmp_path, monkeypatch):
  plan = make_plan(make_sources(tmp_path))
  rows = len(plan.window(0))

  def fail(*_):
    raise OSError("the store is gone")

  monkeypatch.setattr(plan, "_samples", fail)
  plan.row(rows - 1)  # Begins to plan the next window.
  with pytest.raises(OSError, match="the store is gone"):
    plan.row(rows)
  monkeypatch.undo()
  assert plan.row(rows) == make_plan(plan.sources).row(rows)

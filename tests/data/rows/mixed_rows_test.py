import dataclasses

import jax
from jax.sharding import NamedSharding
import numpy as np
import pytest

from cm3leon_jax.config.data import DataConfig
from cm3leon_jax.data.instructions.samples import Drops
from cm3leon_jax.data.rows.loader import RowLoader, batches
from cm3leon_jax.data.rows.plan import RowPlan
from cm3leon_jax.mesh import MeshConfig, create_mesh, spec
from tests.data.stores import VOCAB, make_instructions, make_sources

B, ROWS = 8, 64
CONFIG = DataConfig(sequence_length=128, pack_window=32, code_dropout=0.5)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
  """Returns sources of pairs, texts, and two tasks with dropped instructions and contexts."""
  root = tmp_path_factory.mktemp("stores")
  tasks = [
    dataclasses.replace(
      task, share=0.3, instructions=dataclasses.replace(task.instructions, drops=Drops(0.2, 0.2))
    )
    for task in make_instructions(root)
  ]
  documents = [dataclasses.replace(s, share=0.2) for s in make_sources(root)]
  return [*tasks, *documents]


def open_loader(sources, path=None, writes=False):
  plan = RowPlan(sources, CONFIG, VOCAB, 0, path, writes)
  return RowLoader(plan, VOCAB, mark_sources=True)


@pytest.fixture(scope="module")
def rows(sources):
  loader = open_loader(sources)
  return [loader[i] for i in range(ROWS)]


def assert_row(row, expected):
  assert row.keys() == expected.keys()
  for name, values in expected.items():
    np.testing.assert_array_equal(row[name], values)


def test_rows_hold_all_sources(rows):
  marks = [set(row["sources"].tolist()) - {0} for row in rows]
  assert set.union(*marks) == {1, 2, 3, 4}
  assert any({1, 2} & m and {3, 4} & m for m in marks)


@pytest.mark.parametrize("first_row", [0, 24, 40])
def test_a_run_that_continues_at_a_row_reads_the_rows_that_it_would_have_read(
  sources, rows, first_row, tmp_path
):
  """Earlier windows are not planned again, because the run stored the starts of windows."""
  path = tmp_path / "plan.jsonl"
  before = open_loader(sources, path, writes=True)
  for i in range(first_row):
    before[i]
  loader = open_loader(sources, path)
  planned, plan_window = [], loader.plan._plan_window
  loader.plan._plan_window = lambda window: (planned.append(window), plan_window(window))
  sharding = NamedSharding(create_mesh(MeshConfig(2, 2, 2)), spec("batch", "length"))
  for j, batch in zip(range(2), batches(loader, first_row, B, sharding)):
    found = jax.device_get(batch)
    for r in range(B):
      assert_row({name: x[r] for name, x in found.items()}, rows[first_row + B * j + r])
  window = before.plan._starts.window_of(first_row)
  assert (min(planned), window > 1) == (window, first_row > 0)

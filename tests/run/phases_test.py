"""Tests phases of the mixture: rows before and after a change, and which changes are refused."""

import collections
import copy
import dataclasses

import numpy as np
import pytest

from cm3leon_jax.errors import UserError
from cm3leon_jax.files.json_files import plain
from cm3leon_jax.run import changes
from cm3leon_jax.run.run import Run
from tests.data.stores import VOCAB
from tests.refusals import refused
from tests.run import rows_test
from tests.run.changes_test import RUN, check
from tests.run.rows_test import settings_with

workdir = rows_test.workdir
FIRST, LAST = 40, 80
PHASES = ((FIRST, {"text_share": 0.8}), (LAST, {"num_neighbors": 0, "image_loss_weight": 0.25}))


def phased(*phases, **fields):
  settings = settings_with()
  return dataclasses.replace(
    settings, data=dataclasses.replace(settings.data, phases=phases, **fields)
  )


def read(workdir, settings, rows, write_starts=False):
  loader = Run(workdir, settings).rows("train", write_starts)
  return [loader[i] for i in rows]


def assert_rows(found, expected):
  for row, other in zip(found, expected, strict=True):
    for name, values in other.items():
      np.testing.assert_array_equal(row[name], values)


def shares(workdir, settings, rows):
  """Returns each source's share of the filled positions."""
  loader, filled = Run(workdir, settings).rows("train"), collections.Counter()
  for i in rows:
    plan = loader.of_row(i).plan
    for placement in plan.row(i):
      filled[plan.sources[placement.source].name] += placement.num_positions
  return {name: count / filled.total() for name, count in filled.items()}


def test_a_phase_changes_shares_from_its_row_on_and_no_row_before(workdir):
  one, both = phased(PHASES[0]), phased(*PHASES)
  assert_rows(read(workdir, one, range(FIRST)), plain_rows := read(workdir, phased(), range(FIRST)))
  assert_rows(read(workdir, both, range(LAST)), read(workdir, one, range(LAST)))
  assert len(plain_rows) == FIRST
  assert shares(workdir, both, range(FIRST))["texts"] == pytest.approx(0.3, abs=0.06)
  assert shares(workdir, both, range(FIRST, LAST))["texts"] == pytest.approx(0.8, abs=0.06)


def test_a_phase_changes_neighbors_and_weights(workdir):
  loader = Run(workdir, phased(*PHASES)).rows("train")

  def found(rows):
    neighbors, weights = 0, set()
    for i in rows:
      row, plan = loader[i], loader.of_row(i).plan
      neighbors += sum(len(plan.plan(*place[:3]).neighbors) for place in plan.row(i))
      weights |= {*row["loss_weights"][VOCAB.is_image(row["targets"])].tolist()}
    return neighbors > 0, weights - {0.0}

  assert found(range(FIRST, LAST)) == (True, {1.0})
  assert found(range(LAST, LAST + 20)) == (False, {0.25})


def test_passes_go_on_across_a_phase_and_a_source_may_begin_later(workdir):
  """Only samples of the window that the phase cuts are left out."""
  settings = phased((FIRST, {"text_share": 0.5}), text_share=0.0)
  loader = Run(workdir, settings).rows("train")
  first, second = loader.of_row(0).plan, loader.of_row(FIRST).plan
  assert [source.name for source in first.sources] == ["pairs"]
  assert [source.name for source in second.sources] == ["pairs", "texts"]
  assert second.row(FIRST)  # Plans the window.
  begin = second._starts[0]
  assert begin.taken[1] == 0
  window = first._starts.window_of(FIRST - 1)
  assert begin.taken[0] == settings.data.pack_window * (window + 1)
  following, kept = (
    {(p.pass_, p.unit) for row in rows for p in row if p.source == 0}
    for rows in (first.window(window + 1), second.window(0))
  )
  assert kept < following  # The next units in the order of the pass.


@pytest.mark.parametrize("row", [0, FIRST - 1, FIRST, LAST + 3])
def test_a_run_that_continues_in_any_phase_reads_the_same_rows(workdir, row):
  settings, last = phased(*PHASES), LAST + 10
  (workdir / "train").mkdir()
  read(workdir, settings, range(row), write_starts=True)
  assert_rows(read(workdir, settings, range(row, last)), read(workdir, settings, range(last))[row:])
  written = len([*(workdir / "train").glob("plan*.jsonl")])
  assert written == (row > 0) + (row > FIRST) + (row > LAST)


@pytest.mark.parametrize(
  ("phases", "facts"),
  [
    (((9, {"text_share": 2.0}),), ["data.phases, row 9", "text_share", "2.0"]),
    (((9, {"text_share": 0.4, "interleaved_share": 0.7}),), ["row 9", "at most 1"]),
    (((9, {}), (9, {})), ["9", "rise"]),
    (((9, {"sequence_length": 64}),), ["sequence_length", "text_share"]),
    (((9, {"replay_share": 0.5}),), ["replay_share", "instructions.replay_share"]),
    (("text_share",), ["phases", "first row"]),
  ],
)
def test_wrong_phases_are_refused(phases, facts):
  with refused((UserError, ValueError), *facts):
    phased(*phases)


@pytest.mark.parametrize(("begun", "wrong"), [(40, None), (41, "40"), (81, "80")])
def test_only_a_phase_that_has_not_begun_may_change(monkeypatch, tmp_path, begun, wrong):
  """The flag is needed in any case."""
  monkeypatch.setattr(changes.reading, "next_row", lambda folder: begun)
  stored, new = copy.deepcopy(RUN), ((FIRST, {"text_share": 0.1}), (90, {}))
  stored["data"]["phases"] = plain(PHASES)
  with refused(UserError, "--allow_changed=data.phases"):
    check(stored=stored, data__phases=new)
  if wrong is None:
    assert len(check("data.phases", stored=stored, data__phases=new)) == 1
  else:
    kept = new if wrong == "40" else (PHASES[0], (90, {}))
    with refused(UserError, str(begun), wrong, "rollback"):
      check("data.phases", stored=stored, data__phases=kept)

from etils import epath
from hypothesis import given
from hypothesis import strategies as st
import jax
import numpy as np
import pytest

from cm3leon_jax.data.rows import skipped_rows
from cm3leon_jax.data.rows.loader import RowLoader
from cm3leon_jax.data.rows.skipped_rows import parse, row_number
from cm3leon_jax.errors import UserError
from cm3leon_jax.files.json_files import read_json_lines
from cm3leon_jax.training.saves import upkeep
from cm3leon_jax.weights import checkpoint, reading
from tests.data.stores import VOCAB, make_plan, make_sources
from tests.models.tiny import mesh_of
from tests.refusals import refused
from tests.training.runs import LENGTH, MODEL, STEPS, Crash, assert_equal, crash_at, losses, run


class Poisoned(RowLoader):
  """Loader whose rows `bad` have infinite loss weights, as in a damaged store."""

  bad: range = range(0)

  def __getitem__(self, i):
    row = super().__getitem__(i)
    if i in self.bad:
      row["loss_weights"][np.flatnonzero(row["loss_weights"])[3]] = np.inf
    return row


@pytest.fixture(scope="module")
def loader(tmp_path_factory):
  sources = make_sources(tmp_path_factory.mktemp("stores"))
  return Poisoned(make_plan(sources, sequence_length=LENGTH), VOCAB)


@pytest.fixture(autouse=True)
def no_bad_rows(loader):
  yield
  loader.bad = range(0)


def logged(folder):
  return read_json_lines(folder / "metrics" / "metrics.jsonl")


def params_of(folder, step=None):
  with jax.set_mesh(mesh_of(1, 1, 1)):
    return reading.load_params(folder, MODEL, step)[0]


def skipped_steps(folder):
  return [line["step"] for line in logged(folder) if line.get("skipped")]


def test_row_number_by_hand():
  skipped = [range(6, 7), range(2, 4)]
  assert [row_number(i, skipped) for i in range(5)] == [0, 1, 4, 5, 7]


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 9)), max_size=5), st.integers(0, 40))
def test_row_numbers_are_those_that_are_left(ranges, i):
  skipped = [range(start, start + length) for start, length in ranges]
  left = [n for n in range(200) if not any(n in rows for rows in skipped)]
  assert row_number(i, skipped) == left[i]


def test_a_skipped_step_is_as_if_its_rows_were_left_out(loader, tmp_path, capsys):
  """Step 5 reads rows 32 to 39, of which one is bad. After a kill, the run skips the step again."""
  run(tmp_path / "without", loader, skipped=(range(32, 40),))
  loader.bad = range(35, 36)
  run(tmp_path / "whole", loader)
  assert skipped_steps(tmp_path / "whole") == [5]
  found, expected = losses(tmp_path / "whole"), losses(tmp_path / "without")
  assert sorted(found) == [1, 2, 3, 4, *range(6, STEPS + 1)]
  assert [*found.values()] == [*expected.values()][:-1]
  printed = capsys.readouterr().out
  assert printed.count(" | skipped\n") == 1
  assert "train: 1 of the steps were skipped." in printed
  killed = tmp_path / "killed"
  with pytest.raises(Crash):
    run(killed, loader, sample_grid=crash_at(7, killed), sample_every=1)
  run(killed, loader)
  assert losses(killed) == found
  assert_equal(params_of(killed), params_of(tmp_path / "whole"))


def test_too_many_skipped_steps_stop_the_run_and_it_goes_on_without_their_rows(loader, tmp_path):
  """Steps 6 and 7 read rows 40 to 55, of which two are bad; the checkpoint is from before them."""
  whole, folder = tmp_path / "whole", tmp_path / "run"
  run(whole, loader, skipped=(range(40, 56),))
  loader.bad = range(42, 52, 9)  # Rows 42 and 51 are bad.
  with refused(UserError, "rows 40 to 55", "--skip_rows=40:55"):
    run(folder, loader, max_skipped=1, checkpoint_every=1)
  assert skipped_steps(folder) == [6, 7]
  saved = {path.name.partition(".")[0] for path in (folder / checkpoint.FOLDER).iterdir()}
  assert {"4"} <= saved <= {"3", "4", "5"}  # Step 5 may have been saved, too.
  rows = range(40, 56)
  loader.bad = rows  # All of these rows would be bad, but none is read.
  assert upkeep.rollback(epath.Path(folder), 4, rows)[-1] == (
    "cm3leon train continues from step 4, without rows 40 to 55."
  )
  assert skipped_rows.read(epath.Path(folder)) == [rows]
  with pytest.raises(Crash):
    run(
      folder, loader, skipped=(rows,), sample_every=1, sample_grid=crash_at(9, folder),
      max_skipped=0, checkpoint_every=1,
    )  # fmt: skip
  run(folder, loader, skipped=(rows,), max_skipped=0, checkpoint_every=1)
  assert losses(folder) == losses(whole)
  assert_equal(params_of(folder), params_of(whole))
  (event,) = [line for line in logged(folder) if line.get("event") == "rolled_back"]
  assert (event["step"], event["first"], event["last"]) == (4, 40, 55)
  resumed = [line for line in logged(folder) if line.get("event") == "resumed"]
  assert all(line["replayed"] == line["identical"] for line in resumed)


def test_flags_by_hand():
  assert parse("") is None
  assert parse("4000:4799") == range(4000, 4800)


@pytest.mark.parametrize("skip_rows", ["7", "9:7", "-1:7", "1:" + "9" * 16])
def test_wrong_flags_are_refused(skip_rows):
  with refused(UserError, "--skip_rows", skip_rows):
    parse(skip_rows)


def test_rows_that_the_checkpoint_has_read_are_refused():
  """Compares with the number of rows that the checkpoint has read, whatever the batch size."""
  done = [range(10, 12)]
  with refused(UserError, "--skip_rows", "row 33", "checkpoint 4", "before 34"):
    skipped_rows.check(range(33, 40), done, 4, 32)
  skipped_rows.check(range(34, 40), done, 4, 32)


@pytest.mark.parametrize("content", ["[3]", '[{"resume_from": 1}]', "[", '{"a": 1}'])
def test_a_damaged_record_is_refused(tmp_path, content):
  (tmp_path / skipped_rows.RECORD).write_text(content)
  with refused(UserError, skipped_rows.RECORD):
    skipped_rows.read(epath.Path(tmp_path))

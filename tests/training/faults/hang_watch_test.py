import contextlib
import json
import threading
import time

from etils import epath
import jax
import pytest

from cm3leon_jax.training.faults import hang_watch
from cm3leon_jax.training.faults.hang_watch import HUNG, HangWatch, verdict
from cm3leon_jax.training.watch import goodput
from tests.launched import python

MINUTE = 60.0


class Loop:
  """Training loop with a fake clock that a test advances."""

  def __init__(self, folder, minutes=1.0):
    self.now, self.ended = 100.0, []
    self.stopwatch = goodput.Stopwatch(lambda: self.now)
    self.watch = HangWatch(
      epath.Path(folder), minutes, self.stopwatch, self.ended.append, lambda: self.now
    )
    self.step, self.seconds_of_data = 0, 0.0

  def wait(self, seconds):
    """Advances the clock and runs the checks that the watch's thread would run."""
    for _ in range(round(seconds)):
      self.now += 1
      self.watch.look()

  def steps(self, count, seconds=1.0):
    with self.stopwatch.phase("step"):
      for _ in range(count):
        self.step += 1
        self.watch.before(self.step)
        self.wait(self.seconds_of_data)
        self.watch.ready(self.step)
        self.watch.after(self.step, None, {})
        self.wait(seconds)


@pytest.fixture
def loop(tmp_path):
  loop = Loop(tmp_path)
  with contextlib.closing(loop.stopwatch):
    yield loop


def test_a_run_whose_steps_take_the_allowed_time_goes_on(loop):
  loop.steps(20, MINUTE)
  assert loop.ended == []


def test_a_run_without_a_step_for_longer_prints_where_it_stands_and_ends(loop, capfd):
  loop.steps(7)
  loop.steps(1, MINUTE + 1)
  assert loop.ended == [HUNG]
  out, err = capfd.readouterr()
  warning = "train: warning: no progress for 0.517 minutes at step 8, steps; after 1 the job ends"
  assert warning in out
  assert err.startswith(
    "error: no progress for 1.02 minutes (train.hang_minutes): process 0 of 1 on "
  )
  assert "is at step 8, steps. Its threads:\n" in err
  assert "hang_watch_test.py" in err  # A stack trace.
  assert "in test_a_run_without_a_step_for_longer" in err
  assert err.endswith("error: the job ends with exit code 1: the same command continues it.\n")


def test_waiting_for_data_is_named(loop, capfd):
  loop.steps(4)
  loop.seconds_of_data = MINUTE + 1
  loop.steps(1)
  assert loop.ended == [HUNG]
  assert "is at step 4, waiting for data." in capfd.readouterr().err


@pytest.mark.parametrize("phase", ["restore", "evaluate", "save", "sample"])
def test_what_is_no_step_may_take_four_times_as_long(loop, phase):
  loop.steps(4)
  with loop.stopwatch.phase(phase):
    loop.wait(4 * MINUTE)
    assert loop.ended == []
    loop.wait(1)
  assert loop.ended == [HUNG]


def test_the_first_steps_compile(loop):
  loop.steps(2, 4 * MINUTE)
  assert loop.ended == []
  loop.steps(1, MINUTE + 1)
  assert loop.ended == [HUNG]


def test_steps_that_are_long_from_the_beginning_have_ten_times_as_long(loop):
  loop.steps(6, 12.0)
  loop.steps(1, 120.0)
  assert loop.ended == []
  loop.steps(1, 1_201.0)
  assert loop.ended == [HUNG]


def test_time_in_other_phases_makes_no_step_long(loop):
  loop.steps(4)
  for _ in range(3):
    with loop.stopwatch.phase("save"):
      loop.wait(3 * MINUTE)
    loop.steps(1)
  loop.steps(1, MINUTE + 1)
  assert loop.ended == [HUNG]


def test_a_process_that_was_stopped_as_a_whole_gets_its_time_again(loop):
  loop.steps(4)
  with loop.stopwatch.phase("step"):
    loop.now += 10 * MINUTE
    loop.wait(MINUTE)
    assert loop.ended == []
    loop.wait(2)
  assert loop.ended == [HUNG]


def test_zero_minutes_watch_nothing(tmp_path):
  loop = Loop(tmp_path, minutes=0.0)
  with contextlib.closing(loop.stopwatch), loop.watch:
    assert not loop.watch._thread.is_alive()


def report(step, doing, host="a"):
  return {"step": step, "doing": doing, "host": host}


def test_the_process_that_has_not_arrived_is_named():
  ahead, late = report(42, "step"), report(41, "data", "b")
  sentence = (
    "process 1 on b has not arrived: it is at step 41, waiting for data; process 0 is at step 42, "
    "steps"
  )
  assert verdict({0: ahead, 1: late, 2: ahead}) == (sentence, [1])
  assert verdict({0: ahead, 1: report(42, "evaluate")})[1] == [0]
  assert verdict({0: report(42, "data"), 1: report(42, "evaluate"), 2: ahead})[1] == [2]
  sentence, behind = verdict({0: ahead, 1: None, 2: late, 3: None})
  assert sentence.startswith("process 1, 3 does not respond")
  assert behind == [1, 3]
  sentence, behind = verdict({0: ahead, 1: ahead})
  assert (sentence, behind) == (
    "all 2 processes are at step 42, steps: look at the devices and the network between them",
    [],
  )


@pytest.fixture
def two(monkeypatch):
  """Fakes two processes; returns a function that sets which of them the watch is."""
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(hang_watch, "LINGER_SECONDS", 0.0)
  return lambda i: monkeypatch.setattr(jax, "process_index", lambda: i)


def test_processes_write_where_they_stand_only_while_nothing_goes_on(loop, two, tmp_path):
  two(1)
  path = tmp_path / hang_watch.FOLDER / "1.json"
  loop.steps(7)
  assert not path.parent.exists()
  loop.steps(1, 40.0)
  found = json.loads(path.read_text())
  assert (found["step"], found["doing"], found["process"]) == (8, "step", 1)
  assert "in test_processes_write_where_they_stand" in found["stacks"]
  loop.steps(1)
  assert not path.exists()


@pytest.mark.parametrize(("process", "seconds"), [(0, 0.6), (1, 0.3)])
def test_the_late_one_ends_after_the_others_have_given_up_and_the_first_last(
  loop, two, monkeypatch, process, seconds
):
  """JAX would end the other processes if one ended before the late process is named."""
  two(process)
  monkeypatch.setattr(hang_watch, "LINGER_SECONDS", 0.3)
  loop.steps(4)
  begin = time.monotonic()
  loop.steps(1, MINUTE + 1)
  assert loop.ended == [HUNG]
  assert time.monotonic() - begin >= seconds


@pytest.mark.parametrize(
  ("start", "sentence"),
  [
    ("", "error: process 1 on b has not arrived: it is at step 3, waiting for data; process 0 is "),
    ("an earlier one", "error: process 1 does not respond"),
  ],
)
def test_the_first_process_names_the_late_one_and_prints_its_stacks(
  loop, two, tmp_path, capfd, start, sentence
):
  """Ignores reports that a process wrote in an earlier start."""
  path = tmp_path / hang_watch.FOLDER / "1.json"
  path.parent.mkdir()
  two(0)
  late = {**report(3, "data", "b"), "start": start, "stacks": 'File "pipeline.py", in read'}
  path.write_text(json.dumps(late))
  loop.steps(4)
  loop.steps(1, MINUTE + 1)
  err = capfd.readouterr().err
  assert sentence in err
  assert ('Threads of process 1:\nFile "pipeline.py", in read' in err) == (start == "")


def test_reports_that_cannot_be_written_or_read_do_not_hold_the_end_up(
  loop, two, monkeypatch, capfd
):
  two(0)
  monkeypatch.setattr(hang_watch, "FILE_SECONDS", 0.1)
  answer = threading.Event()
  monkeypatch.setattr(hang_watch, "write_json", lambda *_: answer.wait())
  monkeypatch.setattr(hang_watch, "read_json", lambda *_: answer.wait())
  loop.steps(4)
  loop.steps(1, MINUTE + 1)
  answer.set()
  assert loop.ended == [HUNG]
  assert "cannot be read" in capfd.readouterr().err


STUCK = """
import sys, time
from etils import epath
from cm3leon_jax.training.watch.goodput import Stopwatch
from cm3leon_jax.training.faults.hang_watch import HangWatch

def wait_for_ever():
  time.sleep(600)

with HangWatch(epath.Path(sys.argv[1]), 0.01, Stopwatch()) as watch:
  for step in range(1, 6):
    watch.before(step)
    watch.ready(step)
    watch.after(step, None, {})
    time.sleep(0.05)
  print("stuck", flush=True)
  wait_for_ever()
"""


def test_a_process_that_is_stuck_ends_with_its_stacks(tmp_path):
  result = python(STUCK, tmp_path, timeout=120)
  assert result.returncode == HUNG == 1
  assert result.stdout.startswith("stuck\n")
  assert "in wait_for_ever" in result.stderr

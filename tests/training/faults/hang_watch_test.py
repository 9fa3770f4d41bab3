import contextlib
import time

import jax
import pytest

from cm3leon_jax.training.faults import hang_watch
from cm3leon_jax.training.faults.hang_watch import HUNG, HangWatch
from cm3leon_jax.training.watch import goodput
from tests.launched import python

MINUTE = 60.0


class Loop:
  """Training loop with a fake clock that a test advances."""

  def __init__(self, minutes=1.0):
    self.now, self.ended = 100.0, []
    self.stopwatch = goodput.Stopwatch(lambda: self.now)
    self.watch = HangWatch(minutes, self.stopwatch, self.ended.append, lambda: self.now)
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
def loop():
  loop = Loop()
  with contextlib.closing(loop.stopwatch):
    yield loop


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


def test_zero_minutes_watch_nothing():
  loop = Loop(minutes=0.0)
  with contextlib.closing(loop.stopwatch), loop.watch:
    assert not loop.watch._thread.is_alive()


@pytest.mark.parametrize(("process", "seconds"), [(0, 0.6), (1, 0.3)])
def test_the_late_one_ends_after_the_others_have_given_up_and_the_first_last(
  loop, monkeypatch, process, seconds
):
  """JAX would end the other processes if one ended before all have printed their stacks."""
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(jax, "process_index", lambda: process)
  monkeypatch.setattr(hang_watch, "LINGER_SECONDS", 0.3)
  loop.steps(4)
  begin = time.monotonic()
  loop.steps(1, MINUTE + 1)
  assert loop.ended == [HUNG]
  assert time.monotonic() - begin >= seconds


STUCK = """
import sys, time
from cm3leon_jax.training.watch.goodput import Stopwatch
from cm3leon_jax.training.faults.hang_watch import HangWatch

def wait_for_ever():
  time.sleep(600)

with HangWatch(0.01, Stopwatch()) as watch:
  for step in range(1, 6):
    watch.before(step)
    watch.ready(step)
    watch.after(step, None, {})
    time.sleep(0.05)
  print("stuck", flush=True)
  wait_for_ever()
"""


def test_a_process_that_is_stuck_ends_with_its_stacks():
  result = python(STUCK, timeout=120)
  assert result.returncode == HUNG == 1
  assert result.stdout.startswith("stuck\n")
  assert "in wait_for_ever" in result.stderr

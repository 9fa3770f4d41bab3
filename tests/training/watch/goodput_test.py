import contextlib
import time

import jax
import jax.numpy as jnp
import pytest

from cm3leon_jax.training.watch import goodput


class Clock:
  """Fake clock that a test advances."""

  now = 10.0

  def __call__(self):
    return self.now


@pytest.fixture
def clock():
  return Clock()


@pytest.fixture
def watch(clock):
  with contextlib.closing(goodput.Stopwatch(clock)) as watch:
    yield watch


def test_every_second_belongs_to_one_phase(watch, clock):
  clock.now += 4
  with watch.phase("step"):
    clock.now += 2
    with watch.phase("save"):
      clock.now += 3
    clock.now += 0.5
    watch.move(1.0, "step", "data")
  clock.now += 1
  assert {name: value for name, value in watch.seconds().items() if value} == {
    "restore": 5.0,
    "step": 1.5,
    "save": 3.0,
    "data": 1.0,
  }


def test_compiling_counts_as_such_wherever_it_happens():
  with contextlib.closing(goodput.Stopwatch()) as watch, watch.phase("evaluate"):
    begin = time.perf_counter()
    before = watch.seconds()
    start = time.perf_counter()
    jax.jit(lambda x: jax.jit(lambda y: jnp.sin(y) @ y)(x) + jnp.float32(time.time()))(
      jnp.ones((8, 8))
    )
    wall = time.perf_counter() - start
    after = watch.seconds()
    whole = time.perf_counter() - begin
  spent = {name: after[name] - before[name] for name in after}
  assert 0.2 * wall < spent["compile"] <= wall
  assert set(spent) - {"compile", "evaluate"} == {name for name in spent if not spent[name]}
  assert wall <= spent["compile"] + spent["evaluate"] <= whole + 1e-9


def test_a_trace_within_a_trace_counts_once(watch, clock):
  """Traces (end, duration): inner (11 s, 0.2 s), outer (11.5 s, 0.9 s), another (13 s, 0.3 s)."""
  for clock.now, duration in ((11.0, 0.2), (11.5, 0.9), (13.0, 0.3)):
    jax.monitoring.record_event_duration_secs("/jax/core/compile/jaxpr_trace_duration", duration)
  assert watch.seconds()["compile"] == pytest.approx(1.2)


def test_goodput_is_the_share_of_steps():
  seconds = {"step": 90.0, "compile": 7.5, "save": 2.5, "data": 0.0}
  assert goodput.goodput(seconds) == 0.9
  assert (
    goodput.describe(seconds) == "goodput 90.0% of 100 s: steps 90.0%, compiling 7.5%, saving 2.5%"
  )
  assert goodput.to_line(seconds)["goodput"] == 0.9


def test_earlier_starts_are_added_and_steps_computed_again_are_lost():
  """The earlier start logged times at steps 4 and 8, and was killed 7 s after step 8."""
  logged = goodput.to_line({**dict.fromkeys(goodput.PHASES, 0.0), "step": 30.0, "save": 2.0})
  lines = [
    {"step": 4, "time": 100.0, **logged},
    {"step": 8, "time": 120.0, **logged, "step_seconds": 50.0},
    {"step": 9, "loss": 1.0, "time": 124.0},
    {"step": 10, "loss": 1.0, "time": 127.0},
  ]
  seconds = goodput.earlier(lines, 8)
  assert {name: value for name, value in seconds.items() if value} == {
    "step": 50.0,
    "save": 2.0,
    "lost": 7.0,
  }
  # If checkpoint 8 was incomplete, all time since step 4 is lost.
  assert goodput.earlier(lines, 4)["lost"] == 27.0
  assert goodput.earlier(lines[:2], 8)["lost"] == 0.0
  assert goodput.earlier([{"step": 1, "loss": 1.0, "time": 3.0}], 1) == {}

"""Measures goodput, the share of a run's wall time that is spent in steps."""

from collections.abc import Callable, Iterator
import contextlib
import threading
import time

import jax

# Phases of the trainer's wall time. Each second belongs to exactly one phase.
PHASES = {
  "step": "steps",
  "compile": "compiling",
  "data": "waiting for data",
  "evaluate": "evaluation",
  "save": "saving",
  "sample": "sampling",
  "profile": "profiling",
  "restore": "restoring",
  "lost": "lost to kills",
}


class Stopwatch:
  """Measures wall time by phase, beginning with `restore`. docs/monitoring.md defines the phases.

  Steps run asynchronously, but the loop waits for the metrics of each step, one step late, to log
  them. So host and device run at the same pace, and the time between two dispatches is the time of
  a step.
  """

  def __init__(self, clock: Callable[[], float] = time.perf_counter):
    self._seconds = dict.fromkeys(PHASES, 0.0)
    self._clock = clock
    self._phase, self._mark = "restore", clock()
    self._thread = threading.get_ident()
    self._compiles: list[tuple[float, float]] = []
    jax.monitoring.register_event_duration_secs_listener(self._on_event)

  def close(self) -> None:
    """Stops counting compilation as `compile`; from now on it counts as the current phase."""
    jax.monitoring.unregister_event_duration_listener(self._on_event)

  @contextlib.contextmanager
  def phase(self, name: str) -> Iterator[None]:
    """Counts the time of the `with` block as phase `name`, not as the surrounding phase."""
    before = self._phase
    self._switch(name)
    try:
      yield
    finally:
      self._switch(before)

  def move(self, seconds: float, source: str, target: str) -> None:
    """Moves `seconds` from the phase `source` to the phase `target`."""
    self._seconds[source] -= seconds
    self._seconds[target] += seconds

  def seconds(self) -> dict[str, float]:
    """Returns the seconds spent in each phase, including those of earlier starts, see `add`."""
    self._switch(self._phase)
    return dict(self._seconds)

  def standing(self) -> tuple[str, float]:
    """Returns the current phase, and the seconds since a phase was last changed or read."""
    return self._phase, self._clock() - self._mark

  def add(self, seconds: dict[str, float]) -> None:
    """Adds the seconds per phase of earlier starts of the run."""
    for name, value in seconds.items():
      self._seconds[name] += value

  def _switch(self, name: str) -> None:
    now = self._clock()
    self._seconds[self._phase] += now - self._mark
    self._phase, self._mark = name, now

  def _on_event(self, event: str, duration: float, **_: object) -> None:
    """Counts tracing, lowering and compiling as `compile`.

    JAX reports a nested trace before the outer trace, and the time of the outer trace includes the
    nested trace. So the time of the nested trace is subtracted first.
    """
    if not event.startswith("/jax/core/compile/") or threading.get_ident() != self._thread:
      return
    now = self._clock()
    start = now - duration
    while self._compiles and self._compiles[-1][0] >= start:
      inner = self._compiles.pop()
      self.move(inner[1] - inner[0], "compile", self._phase)
    self._compiles.append((start, now))
    self.move(duration, self._phase, "compile")


def goodput(seconds: dict[str, float]) -> float:
  """Returns the time spent in steps, as a share of the time spent in all phases."""
  return seconds["step"] / max(sum(seconds.values()), 1e-9)


def to_line(seconds: dict[str, float]) -> dict[str, float]:
  """Returns the fields for metrics.jsonl: `goodput`, and `PHASE_seconds` for each phase."""
  return {
    "goodput": round(goodput(seconds), 4),
    **{f"{name}_seconds": round(value, 3) for name, value in seconds.items()},
  }


def earlier(lines: list[dict], resumed_at: int) -> dict[str, float]:
  """Returns, for each phase, the seconds that earlier starts of a run spent in it.

  `lines` are from metrics.jsonl, and this start continues from the checkpoint of step `resumed_at`.
  Returns the seconds of the last goodput line up to `resumed_at`. The logged time after that line
  counts as `lost`, because its steps are computed again. The time between a kill and this start is
  not counted.
  """
  goodputs = [line for line in lines if "goodput" in line and line["step"] <= resumed_at]
  if not goodputs:
    return {}
  seconds = {name: goodputs[-1].get(f"{name}_seconds", 0.0) for name in PHASES}
  times = [line["time"] for line in lines if "time" in line]
  seconds["lost"] += max(0.0, times[-1] - goodputs[-1]["time"])
  return seconds


def describe(seconds: dict[str, float]) -> str:
  """Formats the number of seconds in each phase as a line of text.

  {"step": 90.0, "compile": 7.5, "save": 2.5, "data": 0.0} ->
  "goodput 90.0% of 100 s: steps 90.0%, compiling 7.5%, saving 2.5%"
  """
  total = sum(seconds.values())
  shares = {name: f"{100 * value / max(total, 1e-9):.1f}%" for name, value in seconds.items()}
  shown = [
    f"{PHASES[name]} {shares[name]}" for name, value in seconds.items() if value > 0.0005 * total
  ]
  return f"goodput {shares['step']} of {total:,.0f} s: {', '.join(shown)}"

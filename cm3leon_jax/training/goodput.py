"""Goodput: the share of a run's wall time that went into steps, measured on the host, which never waits for it."""

import contextlib
import threading
import time

import jax

# What the wall time of the trainer is divided into; each second belongs to one of them.
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
  """Wall time by phase, from its making on; `restore` until another is entered. docs/monitoring.md defines them.

  Steps run asynchronously, but the loop logs each one step late and waits for its metrics then, so that host and device
  advance at one pace: the time between two dispatches is that of a step.
  """

  def __init__(self):
    self._seconds = dict.fromkeys(PHASES, 0.0)
    self._phase, self._mark = "restore", time.perf_counter()
    self._thread = threading.get_ident()
    self._compiles: list[tuple[float, float]] = []
    jax.monitoring.register_event_duration_secs_listener(self._on_event)

  def stop(self) -> None:
    """From here on compiling no longer counts as `compile`, whichever phase it happens in."""
    jax.monitoring.unregister_event_duration_listener(self._on_event)

  @contextlib.contextmanager
  def phase(self, name: str):
    """The body counts as `name`, and not as the phase around it."""
    before = self._phase
    self._switch(name)
    try:
      yield
    finally:
      self._switch(before)

  def move(self, seconds: float, source: str, target: str) -> None:
    """Counts `seconds` as `target` that were counted as `source`."""
    self._seconds[source] -= seconds
    self._seconds[target] += seconds

  def seconds(self) -> dict[str, float]:
    """Seconds of every phase, up to now; they sum to the wall time since the start and what was added."""
    self._switch(self._phase)
    return dict(self._seconds)

  def add(self, seconds: dict[str, float]) -> None:
    """Adds what earlier starts of the run took."""
    for name, value in seconds.items():
      self._seconds[name] += value

  def _switch(self, name: str) -> None:
    now = time.perf_counter()
    self._seconds[self._phase] += now - self._mark
    self._phase, self._mark = name, now

  def _on_event(self, event: str, duration: float, **_) -> None:
    """Counts tracing, lowering and compiling; a trace within another is told first, and then again as part of that."""
    if not event.startswith("/jax/core/compile/") or threading.get_ident() != self._thread:
      return
    now = time.perf_counter()
    start = now - duration
    while self._compiles and self._compiles[-1][0] >= start:
      inner = self._compiles.pop()
      self.move(inner[1] - inner[0], "compile", self._phase)
    self._compiles.append((start, now))
    self.move(duration, self._phase, "compile")


def goodput(seconds: dict[str, float]) -> float:
  """`step` over the sum of all phases."""
  return seconds["step"] / max(sum(seconds.values()), 1e-9)


def to_line(seconds: dict[str, float]) -> dict[str, float]:
  """Fields of metrics.jsonl: `goodput`, and `step_seconds` and so on."""
  return {
    "goodput": round(goodput(seconds), 4),
    **{f"{name}_seconds": round(value, 3) for name, value in seconds.items()},
  }


def earlier(lines: list[dict], resumed_at: int) -> dict[str, float]:
  """What the starts of a run before this one took, by phase.

  Args:
    lines: metrics.jsonl as the start before left it.
    resumed_at: step of the checkpoint that this start continues from.

  Returns:
    Seconds of the last goodput line up to that step, and as `lost` also what the log goes on for beyond it: steps that are
    computed again. The time between a kill and this start is in none of them.
  """
  told = [line for line in lines if "goodput" in line and line["step"] <= resumed_at]
  if not told:
    return {}
  seconds = {name: told[-1].get(f"{name}_seconds", 0.0) for name in PHASES}
  times = [line["time"] for line in lines if "time" in line]
  seconds["lost"] += max(0.0, times[-1] - told[-1]["time"])
  return seconds


def describe(seconds: dict[str, float]) -> str:
  """`describe({"step": 90.0, "compile": 7.5, "save": 2.5, "data": 0.0})`

  -> "goodput 90.0% of 100 s: steps 90.0%, compiling 7.5%, saving 2.5%"
  """
  total = sum(seconds.values())
  share = lambda value: f"{100 * value / max(total, 1e-9):.1f}%"
  parts = [
    f"{PHASES[name]} {share(value)}" for name, value in seconds.items() if value > 0.0005 * total
  ]
  return f"goodput {share(seconds['step'])} of {total:,.0f} s: {', '.join(parts)}"

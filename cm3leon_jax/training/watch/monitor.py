"""Logs and prints how a run trains: metrics, rates, goodput, held-out losses and traces."""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import datetime
import time
from typing import Any

import jax
import optax
from PIL import Image

from cm3leon_jax.config.training import TrainConfig
from cm3leon_jax.training.loop import Hook
from cm3leon_jax.training.step.loss import SOURCE_SUMS, source_losses
from cm3leon_jax.training.step.numerics import SkipCounter, finite_values
from cm3leon_jax.training.step.state import TrainState
from cm3leon_jax.training.steps import is_checked
from cm3leon_jax.training.watch import flops
from cm3leon_jax.training.watch.boards import Board
from cm3leon_jax.training.watch.goodput import Stopwatch, describe, goodput, to_line
from cm3leon_jax.training.watch.metrics import MetricsLog
from cm3leon_jax.training.watch.traces import Profiler


def step_line(step: int, steps: int, values: dict, devices: int, left: float | None) -> str:
  """Formats the printed line of a step. Unknown values appear as `-`.

    step 120/1,100 | loss 3.412 image 3.301 text 4.127 | grad 0.871 | lr 4.90e-03 |
    2,310 tokens/s/device | MFU - | 0:05:12 left

  In reinforcement learning, `reward 0.812 spread 0.241 dead_groups 0.375 kl 0.013` replaces the
  loss. The line of a skipped step ends with `| skipped`. `values` come from the step's line in
  metrics.jsonl, but its rates cover all steps since the previous printed line. `left` is the
  remaining time in seconds.
  """
  rate = f"{values['tokens_per_second'] / devices:,.0f}" if "tokens_per_second" in values else "-"
  mfu = f"{100 * values['mfu']:.1f}%" if "mfu" in values else "-"
  time_left = "-" if left is None else str(datetime.timedelta(seconds=round(left)))
  learned = (
    f"loss {values['loss']:.3f} image {values['image_loss']:.3f} text {values['text_loss']:.3f}"
  )
  if "reward" in values:
    names = ("reward", "spread", "dead_groups", "kl")
    learned = " ".join(f"{name} {values[name]:.3f}" for name in names)
  return (
    f"step {step:,}/{steps:,} | {learned} | grad {values['grad_norm']:.3f} | "
    f"lr {values['learning_rate']:.2e} | {rate} tokens/s/device | MFU {mfu} | {time_left} left"
    f"{' | skipped' if values.get('skipped') else ''}"
  )


def heldout_lines(step: int, steps: int, losses: dict[str, float], share: float) -> list[str]:
  """Formats the printed lines of an evaluation. The second line appears only if rows have sources.

    step 40/60 | held-out loss 1.946 image 0.955 text 6.756 | goodput 44.7%
    step 40/60 | held-out by source: count 0.031 draw 2.014 pairs 1.946

  `losses` is the result of `heldout.evaluate`, and `share` is the goodput, in [0, 1].
  """
  modalities, sources = split_by_source(losses)
  shown = [
    " ".join(f"{name} {value:.3f}" for name, value in part.items())
    for part in (modalities, sources)
  ]
  at = f"step {step:,}/{steps:,} | held-out"
  lines = [f"{at} {shown[0]} | goodput {share:.1%}"]
  return [*lines, f"{at} by source: {shown[1]}"] if sources else lines


def change_line(before: dict[str, float], after: dict) -> str:
  """Formats how tuning changed the held-out losses by source, or by modality if rows lack sources.

    train: held-out loss before -> after: count 5.310 -> 0.031, pairs 1.871 -> 1.946 nats per target

  `before` is the result of `heldout.evaluate` at step 0, and `after` is the summary of the run. A
  source without a loss in `after`, which may cover fewer rows, is left out.
  """
  after = {name: after[name] for name in before if name in after}
  pairs = [split_by_source(losses) for losses in (before, after)]
  by_source = all(sources for _, sources in pairs)
  first, last = (sources if by_source else modalities for modalities, sources in pairs)
  shown = [f"{name} {first[name]:.3f} -> {last[name]:.3f}" for name in first if name in last]
  return f"train: held-out loss before -> after: {', '.join(shown)} nats per target"


def split_by_source(losses: dict[str, float]) -> tuple[dict[str, float], dict[str, float]]:
  """Splits held-out losses into losses by modality and losses by source, with short names.

  {"heldout_loss": 1.0, "heldout_image_loss": 2.0, "heldout_loss/draw": 3.0} ->
  {"loss": 1.0, "image": 2.0}, {"draw": 3.0}
  """
  modalities, sources = {}, {}
  for name, value in losses.items():
    kind, _, source = name.removeprefix("heldout_").partition("/")
    if source:
      sources[source] = value
    else:
      modalities[kind.replace("_loss", "")] = value
  return modalities, sources


class Monitor(Hook):
  """Logs metrics one step late, so that the host does not wait for the step it has just started.

  The loop runs in the monitor's `with` block. Other hooks use it to measure and log:

    with monitor.phase("save", step):
      save(state)
  """

  def __init__(
    self, log: MetricsLog, watch: Stopwatch, rates: flops.Rates, schedule: optax.Schedule,
    config: TrainConfig, profiler: Profiler, boards: list[Board], sources: Sequence[str] = (),
    skipped: int = 0,
  ):  # fmt: skip
    """Creates a monitor from the outputs that `open_monitor` opens.

    Args:
      log: metrics.jsonl. A process whose log is disabled prints nothing.
      watch: Stopwatch that has run since this process began the training.
      schedule: learning rate as a function of the step.
      sources: names of the sources of rows. Losses are logged per source.
      skipped: number of steps that earlier starts have skipped.
    """
    self._skips = SkipCounter(config.max_skipped, skipped)
    self._sources = sources
    self._log, self._watch, self._rates, self._schedule = log, watch, rates, schedule
    self._config, self._profiler, self._boards = config, profiler, boards
    self._logged: dict[str, float] = {}  # Seconds per phase at the last goodput line.
    # The step to log next: (step, metrics, stopwatch time at its end if it has already ended).
    self._pending: tuple[int, dict, float | None] | None = None
    self._ended = 0.0  # Stopwatch time at the end of the last logged step.
    # Total weight, total seconds and number of the steps since the last printed line.
    self._unprinted = (0.0, 0.0, 0)
    # First step that this start logged, and seconds in the loop at that time.
    self._begin: tuple[int, float] | None = None
    self._waits = 0.0  # Time at which the loop began to wait for a batch.
    self._phases, self._traced = contextlib.ExitStack(), contextlib.ExitStack()

  def __enter__(self) -> "Monitor":
    self._phases.enter_context(self._watch.phase("step"))
    self._ended = self._in_steps()
    return self

  def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
    self._traced.close()
    self._phases.close()
    self._profiler.stop()
    self._log.flush()
    for board in self._boards:
      board.close()
    if error is None:
      if self._skips.total:
        self._print(f"train: {self._skips.total} of the steps were skipped.")
      self._print(f"train: {describe(self._logged or self._watch.seconds())}")

  def before(self, step: int) -> None:
    """See `Hook`. Begins to trace the step if the user selected it.

    The function of a checked step, or of the step before it, may return only after the step has
    finished. So the previous step is logged first. Otherwise its measured time would include this
    step.
    """
    if is_checked(self._config, step) or is_checked(self._config, step + 1):
      self.flush()
    self._traced.enter_context(self._profiler.step(step, self.flush))
    self._waits = time.perf_counter()

  def ready(self, step: int) -> None:
    """See `Hook`. Counts the wait for the batch as data unless the device computed meanwhile."""
    if self._pending is None or _is_done(self._pending[1]):
      self._watch.move(time.perf_counter() - self._waits, "step", "data")

  def after(self, step: int, state: Any, metrics: dict) -> None:
    """See `Hook`. Keeps the metrics of `step` and logs the metrics of the previous step."""
    self._traced.close()
    ended = self._in_steps() if _is_done(metrics) else None
    self.flush(halved=ended is not None)
    self._pending = (step, metrics, ended)
    if self._profiler.ends_with(step):
      self.flush()
      with self._watch.phase("profile"):
        self._profiler.stop()
      self._print(f"train: the trace that ends with step {step:,} is in {self._profiler.folder}.")

  @contextlib.contextmanager
  def phase(self, name: str, step: int) -> Iterator[None]:
    """Waits for `step` and logs it; then counts the time of the `with` block as phase `name`."""
    self.flush()
    with self._watch.phase(name):
      yield
    if name in ("evaluate", "save"):
      self._logged = self._watch.seconds()
      line = {"time": round(time.time(), 3), **to_line(self._logged)}
      self._log.write(step, line)
      self._log.flush()
      for board in self._boards:
        if name == "evaluate":
          board.scalars(step, line)
        board.flush()

  def heldout(self, step: int, losses: dict[str, float]) -> None:
    """Logs and prints the held-out losses of `step`, see `heldout.evaluate`."""
    self._write(step, losses)
    share = goodput(self._watch.seconds())
    for line in heldout_lines(step, self._config.steps, losses, share):
      self._print(line)

  def logged_heldout(self, step: int) -> dict[str, float]:
    """Returns the held-out losses that an earlier start logged at `step`, or {}."""
    lines = [line for line in self._log.before if line["step"] == step]
    return {
      name: value for line in lines for name, value in line.items() if name.startswith("heldout_")
    }

  def samples(self, step: int, sheet: Image.Image | None) -> None:
    """Writes a grid of samples to the boards. Does nothing if `sheet` is None."""
    if sheet is not None:
      for board in self._boards:
        board.samples(step, sheet)

  def skipped_in_a_row(self) -> int:
    """Returns the number of consecutive skipped steps up to the last dispatched step.

    Waits for this step and logs it.
    """
    self.flush()
    return self._skips.in_a_row

  def flush(self, halved: bool = False) -> None:
    """Waits for the last dispatched step and logs it. `halved` is described in `_add_rates`.

    Raises:
      TooManySkippedError: see `SkipCounter`.
    """
    if self._pending is None:
      return
    (step, metrics, ended), self._pending = self._pending, None
    result = jax.device_get(metrics)
    values = {name: float(x) for name, x in result.items() if name not in SOURCE_SUMS}
    values |= source_losses(self._sources, result)
    left = self._add_rates(step, values, ended, halved)
    # The optimizer's schedule does not count skipped steps.
    values["learning_rate"] = float(self._schedule(step - 1 - self._skips.total))
    self._write(step, {**values, "time": round(time.time(), 3)})
    shown = step % self._config.log_every == 0 or values.get("skipped")
    assert self._begin is not None  # `_add_rates` sets it.
    if shown or step in (self._begin[0], self._config.steps):
      if self._unprinted[2]:
        values |= self._rates.of(*self._unprinted)
      self._unprinted = (0.0, 0.0, 0)
      self._print(step_line(step, self._config.steps, values, self._rates.devices, left))
    self._skips.add(step, values)

  def _add_rates(self, step: int, values: dict, ended: float | None, halved: bool) -> float | None:
    """Adds the rates of a step to `values`, and returns the seconds left to the end of the run.

    For the first step of a start, which includes compilation, adds nothing and returns None.

    Args:
      values: values of the step's line in metrics.jsonl.
      ended: result of `_in_steps` at the end of the step; None: the step has just ended.
      halved: if True and `ended` is None, the next step has also ended. Each of the two steps then
        gets half of the time.
    """
    if ended is None:
      ended = (self._ended + self._in_steps()) / 2 if halved else self._in_steps()
    taken, self._ended = max(ended - self._ended, 1e-9), ended
    phases = self._watch.seconds()
    loop = sum(phases.values()) - phases["compile"] - phases["restore"]
    if self._begin is None:
      self._begin = (step, loop)
      return None
    values |= self._rates.of(values["weight"], taken)
    weight, seconds, steps = self._unprinted
    self._unprinted = (weight + values["weight"], seconds + taken, steps + 1)
    return (loop - self._begin[1]) / (step - self._begin[0]) * (self._config.steps - step)

  def _in_steps(self) -> float:
    """Returns the seconds spent in steps and in waiting for data."""
    phases = self._watch.seconds()
    return phases["step"] + phases["data"]

  def _write(self, step: int, values: dict) -> None:
    values = finite_values(values)
    self._log.write(step, values)
    for board in self._boards:
      board.scalars(step, values)

  def _print(self, text: str) -> None:
    if self._log.enabled:
      print(text, flush=True)


def _is_done(metrics: dict) -> bool:
  return all(x.is_ready() for x in metrics.values() if hasattr(x, "is_ready"))


@dataclasses.dataclass
class SampleGrids(Hook):
  """Draws a grid of samples every `sample_every` steps and after the last step of the run.

  `sample_grid` maps (params, step) to a PIL image or None. If `sample_grid` is None, there are no
  grids.
  """

  config: TrainConfig
  monitor: Monitor
  sample_grid: Callable[[dict, int], Image.Image | None] | None

  def after(self, step: int, state: TrainState, metrics: dict) -> None:
    if self.sample_grid is None:
      return
    if step % self.config.sample_every == 0 or step == self.config.steps:
      with self.monitor.phase("sample", step):
        self.monitor.samples(step, self.sample_grid(state.eval_params, step))

import dataclasses
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm3leon_jax.config.training import TrainConfig
from cm3leon_jax.files.json_files import read_json_lines
from cm3leon_jax.training.step.numerics import TooManySkippedError
from cm3leon_jax.training.watch.flops import Rates
from cm3leon_jax.training.watch.goodput import Stopwatch
from cm3leon_jax.training.watch.metrics import MetricsLog
from cm3leon_jax.training.watch.monitor import Monitor, SampleGrids, step_line
from cm3leon_jax.training.watch.traces import Profiler
from tests.refusals import refused
from tests.training.fakes import FakeMonitor, FakeState

VALUES = {
  "loss": 3.4123,
  "image_loss": 3.3011,
  "text_loss": 4.127,
  "grad_norm": 0.8712,
  "weight": 1_000.0,
}
GRIDS = TrainConfig(steps=7, sample_every=3)
RATES = Rates(flops=2e12, devices=2, peak=None)


def make_monitor(
  folder, rates=RATES, enabled=True, resumed_at=None, clock=time.perf_counter, **fields
):
  log = MetricsLog(folder, resumed_at, enabled)
  config = TrainConfig(**{"steps": 6, **fields})
  return Monitor(
    log, Stopwatch(clock), rates, lambda step: 1e-3 * step, config, Profiler(folder, range(0)), []
  )


def follow(monitor, steps, **changed):
  """Passes metrics of the given steps to a monitor, as the training loop would."""
  metrics = {name: jnp.float32(x) for name, x in {**VALUES, **changed}.items()}
  with monitor:
    for step in steps:
      monitor.before(step)
      monitor.ready(step)
      monitor.after(step, None, metrics)
    monitor.flush()


def test_a_line_by_hand():
  values = {**VALUES, "learning_rate": 4.9e-3, "tokens_per_second": 4_620.0, "mfu": 0.4123}
  assert step_line(120, 1_100, values, 2, 312.4) == (
    "step 120/1,100 | loss 3.412 image 3.301 text 4.127 | grad 0.871 | lr 4.90e-03 | "
    "2,310 tokens/s/device | MFU 41.2% | "
    "0:05:12 left"
  )
  del values["tokens_per_second"], values["mfu"]
  assert step_line(1, 1_100, values, 2, None).endswith("| - tokens/s/device | MFU - | - left")


class Device:
  """Fake device that computes asynchronously, and a clock in seconds."""

  def __init__(self):
    self.now = self._free = 0.0

  def clock(self) -> float:
    return self.now

  def start(self, seconds: float) -> dict:
    """Starts a step and returns its metrics, which are available when the step is finished."""
    self._free = max(self.now, self._free) + seconds
    return {name: Metric(self, value, self._free) for name, value in VALUES.items()}

  def wait(self, left: float = 0.0) -> None:
    """Waits until at most `left` seconds of the started work remain."""
    self.now = max(self.now, self._free - left)


@dataclasses.dataclass(frozen=True)
class Metric:
  """Fake jax.Array: a number that is available at a given time; reading it waits until then."""

  device: Device
  value: float
  done: float

  def is_ready(self) -> bool:
    return self.device.now >= self.done

  def __array__(self):
    self.device.now = max(self.device.now, self.done)
    return np.float32(self.value)


def test_rates_are_those_of_the_wall_time_although_checked_steps_block(tmp_path, capsys):
  """Steps take 1 s. Every third step is a checked step, takes 2.5 s, and blocks until its end.

  The step before a checked step blocks for half of its computation.
  """
  device, rates = Device(), dataclasses.replace(RATES, peak=1e13)
  fields = {"steps": 12, "log_every": 6, "replay_every": 3}
  monitor = make_monitor(tmp_path, rates, clock=device.clock, **fields)
  with monitor:
    for step in range(1, 13):
      monitor.before(step)
      metrics = device.start(2.5 if step % 3 == 0 else 1.0)
      if step % 3 != 1:
        device.wait(left=0.5 if step % 3 == 2 else 0.0)
      monitor.after(step, None, metrics)
    monitor.flush()
  lines = read_json_lines(tmp_path / "metrics.jsonl")[1:12]
  usual, checked = (1_000.0, 0.1), (400.0, 0.04)
  assert [(line["tokens_per_second"], line["mfu"]) for line in lines] == [
    checked if line["step"] % 3 == 0 else usual for line in lines
  ]
  printed = [x for x in capsys.readouterr().out.splitlines() if x.startswith("step ")]
  assert [x.split(" | ", 4)[-1] for x in printed] == [
    "- tokens/s/device | MFU - | - left",
    "312 tokens/s/device | MFU 6.2% | 0:00:10 left",  # Steps 2 to 6 take 8 s on 2 devices.
    "333 tokens/s/device | MFU 6.7% | 0:00:00 left",  # Steps 7 to 12 take 9 s.
  ]


@pytest.mark.parametrize("blocks", [(), (3, 4), range(1, 9)])
def test_rates_add_up_to_the_wall_time_whichever_steps_block(tmp_path, blocks):
  """Each step takes 1 s, and some steps block; the monitor does not know in advance which."""
  device = Device()
  monitor = make_monitor(tmp_path, clock=device.clock, steps=8)
  with monitor:
    for step in range(1, 9):
      monitor.before(step)
      metrics = device.start(1.0)
      if step in blocks:
        device.wait()
      monitor.after(step, None, metrics)
    monitor.flush()
  lines = read_json_lines(tmp_path / "metrics.jsonl")[1:8]
  assert [line["tokens_per_second"] for line in lines] == [1_000.0] * 7


@pytest.mark.parametrize(
  ("log_every", "printed"), [(1, [1, 2, 3, 4, 5, 6]), (4, [1, 4, 6]), (100, [1, 6])]
)
def test_a_line_a_step_or_every_few_but_the_file_has_all(tmp_path, capsys, log_every, printed):
  follow(make_monitor(tmp_path, log_every=log_every), range(1, 7))
  lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
  assert [int(line.split("/")[0].removeprefix("step ")) for line in lines] == printed
  assert [
    line["step"] for line in read_json_lines(tmp_path / "metrics.jsonl") if "loss" in line
  ] == [1, 2, 3, 4, 5, 6]


def test_a_step_is_logged_when_the_next_one_has_started(tmp_path):
  monitor = make_monitor(tmp_path)
  metrics = {name: jnp.float32(x) for name, x in VALUES.items()}

  def logged():
    lines = read_json_lines(tmp_path / "metrics.jsonl")
    return [line["step"] for line in lines if "loss" in line]

  with monitor:
    monitor.after(1, None, metrics)
    assert logged() == []
    monitor.after(2, None, metrics)
    assert logged() == [1]
    with monitor.phase("save", 2):  # A phase of step 2 waits until step 2 has finished.
      assert logged() == [1, 2]
  lines = read_json_lines(tmp_path / "metrics.jsonl")
  # Reports recognize the first step of a start by the missing field.
  assert "tokens_per_second" not in lines[0]
  assert "tokens_per_second" in lines[1]
  assert lines[2]["step"] == 2
  assert "save_seconds" in lines[2]


def test_one_skipped_step_too_many_in_a_row_stops_the_run(tmp_path, capsys):
  """Prints and logs each skipped step, without numbers that JSON cannot represent."""
  monitor, nan = make_monitor(tmp_path, max_skipped=2, log_every=100, steps=99), float("nan")
  follow(monitor, range(2, 4), loss=nan, skipped=1.0)
  follow(monitor, [4], skipped=0.0)  # A step that is not skipped resets the count.
  with refused(TooManySkippedError, "step 7", "2 others", "nan") as stop:
    follow(monitor, range(5, 9), loss=nan, grad_norm=float("inf"), skipped=1.0)
  assert stop.value.steps == range(5, 8)
  text = (tmp_path / "metrics.jsonl").read_text()
  lines = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
  steps = {line["step"]: line for line in lines if "skipped" in line}
  assert {step: line["skipped"] for step, line in steps.items()} == {
    2: 1, 3: 1, 4: 0, 5: 1, 6: 1, 7: 1,
  }  # fmt: skip
  assert [step for step, line in steps.items() if "loss" in line] == [4]
  # Only steps that were not skipped advance the learning rate schedule.
  assert steps[4]["learning_rate"] == pytest.approx(1e-3)
  printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
  assert [line.partition("/")[0] for line in printed if line.endswith(" | skipped")] == [
    f"step {i}" for i in (2, 3, 5, 6, 7)
  ]


def test_waiting_for_data_counts_where_the_device_has_nothing_to_do(tmp_path):
  """Metrics are available at once, so the device is idle while the loop waits for data."""
  monitor = make_monitor(tmp_path)
  metrics = jax.block_until_ready({name: jnp.float32(x) for name, x in VALUES.items()})
  start = time.perf_counter()
  with monitor:
    for step in (1, 2, 3):
      monitor.before(step)
      time.sleep(0.02)
      monitor.ready(step)
      monitor.after(step, None, metrics)
    with monitor.phase("evaluate", 3):
      pass
  seconds = time.perf_counter() - start
  line = read_json_lines(tmp_path / "metrics.jsonl")[-1]
  # All waits count as waiting, and no time counts twice.
  assert line["data_seconds"] >= 0.06
  assert line["data_seconds"] + line["step_seconds"] <= seconds + 0.01


def test_grids_are_made_every_few_steps_and_of_the_last_one():
  monitor = FakeMonitor()
  hook = SampleGrids(GRIDS, monitor, lambda params, step: f"grid of the {params}, {step}")
  for step in range(1, 8):
    hook.after(step, FakeState(step), {})
  assert monitor.events == [
    part
    for step in (3, 6, 7)
    for part in (f"sample {step}", (step, f"grid of the average, {step}"), "end")
  ]

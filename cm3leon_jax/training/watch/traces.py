"""Traces selected steps for XProf and TensorBoard's profile plugin."""

from collections.abc import Callable, Iterator
import contextlib
import pathlib
import re
import tempfile

from etils import epath
import jax

from cm3leon_jax.errors import UserError

FOLDER = "profile"


def parse_steps(text: str, steps: int) -> range:
  """Parses FIRST:LAST, the first and the last step to trace. Empty text means an empty range.

    parse_steps("10:13", 100) == range(10, 14)

  Raises:
    UserError: `text` is not FIRST:LAST, or the steps are outside of the run.
  """
  if not text:
    return range(0)
  match = re.fullmatch(r"(\d+):(\d+)", text)
  if not match or not 1 <= int(match[1]) <= int(match[2]) <= steps:
    raise UserError(
      f"--profile_steps is '{text}'; it must be FIRST:LAST, e.g. 10:13, "
      f"with 1 <= FIRST <= LAST <= train.steps = {steps}."
    )
  return range(int(match[1]), int(match[2]) + 1)


class Profiler:
  """Writes one trace (xplane) of a range of steps to `folder`. Does nothing if the range is empty.

  The profiler cannot write to a GCS bucket, so the trace is collected on the local disk and then
  copied.
  """

  def __init__(self, folder: epath.PathLike, steps: range):
    self.folder, self._steps = epath.Path(folder), steps
    self._collected: tempfile.TemporaryDirectory | None = None

  @contextlib.contextmanager
  def step(self, step: int, wait: Callable[[], None]) -> Iterator[None]:
    """If `step` is in the range, traces the `with` block, which dispatches `step`.

    `wait` is called before the first traced step and waits until the device is idle.
    """
    if step in self._steps and self._collected is None:
      wait()
      self._collected = tempfile.TemporaryDirectory()
      jax.profiler.start_trace(self._collected.name)
    with jax.profiler.StepTraceAnnotation("train", step_num=step):
      yield

  def ends_with(self, step: int) -> bool:
    """Returns whether the trace ends with `step`. If so, wait for the step, then call `stop`."""
    return self._collected is not None and step >= self._steps[-1]

  def stop(self) -> None:
    """Ends a running trace and writes it."""
    if self._collected is None:
      return
    jax.profiler.stop_trace()
    source = pathlib.Path(self._collected.name)
    for path in (p for p in source.rglob("*") if p.is_file()):
      target = self.folder / path.relative_to(source).as_posix()
      target.parent.mkdir(parents=True, exist_ok=True)
      target.write_bytes(path.read_bytes())
    self._collected.cleanup()
    self._collected, self._steps = None, range(0)

import jax
import jax.numpy as jnp
import pytest

from cm3leon_jax.errors import UserError
from cm3leon_jax.training.watch.traces import Profiler, parse_steps
from tests.refusals import refused


def traced_steps(folder):
  """Returns the step numbers in the trace under `folder`."""
  (path,) = folder.rglob("*.xplane.pb")
  lines = [
    line for plane in jax.profiler.ProfileData.from_file(str(path)).planes for line in plane.lines
  ]
  return sorted(
    dict(e.stats)["step_num"] for line in lines for e in line.events if e.name == "train"
  )


def test_the_pair_names_both_ends():
  assert parse_steps("10:13", 100) == range(10, 14)
  assert parse_steps("3:3", 3) == range(3, 4)
  assert parse_steps("", 100) == range(0)


@pytest.mark.parametrize("text", ["10", "13:10", "0:3", "10:101"])
def test_steps_that_cannot_be_traced_are_refused(text):
  with refused(UserError, "--profile_steps", f"'{text}'"):
    parse_steps(text, 100)


def test_only_the_chosen_steps_are_traced_and_waiting_comes_before_the_first(tmp_path):
  profiler, waits = Profiler(tmp_path, range(3, 5)), []
  for step in range(1, 7):
    with profiler.step(step, lambda step=step: waits.append(step)):
      x = jnp.ones(3) + step
    if profiler.ends_with(step):
      x.block_until_ready()
      profiler.stop()
  assert traced_steps(tmp_path) == [3, 4]
  assert waits == [3]


def test_without_steps_nothing_is_written(tmp_path):
  profiler = Profiler(tmp_path / "profile", range(0))
  with profiler.step(1, lambda: None):
    pass
  assert not profiler.ends_with(1)
  profiler.stop()
  assert not (tmp_path / "profile").exists()

import jax.numpy as jnp

from cm3leon_jax.config import UserError
from cm3leon_jax.files.json_files import read_json_lines
from cm3leon_jax.training.small.lines import Lines, ShownLines
from cm3leon_jax.training.watch.metrics import MetricsLog
from tests.messages import refused


def make(folder):
  return Lines(MetricsLog(folder), 3, 7, "clip", "train again.")


def test_some_steps_and_the_last_one_are_logged_and_shown(tmp_path):
  lines, shown = make(tmp_path), []
  show = ShownLines(lines, lambda step, values: shown.append({"step": step, **values}))
  for step in range(1, 8):
    for hook in (lines, show):
      hook.after(step, None, {"loss": jnp.float32(step / 2)})
  lines.end(None)
  assert shown == [{"step": step, "loss": step / 2} for step in (3, 6, 7)]
  assert read_json_lines(tmp_path / "metrics.jsonl") == shown


def test_a_number_that_is_not_finite_ends_the_training_and_is_not_logged(tmp_path):
  lines = make(tmp_path)
  lines.after(2, None, {"loss": jnp.float32("nan")})  # This line is not read.
  metrics = {"loss": jnp.float32("nan"), "scale": jnp.float32(2)}
  with refused(UserError):
    lines.after(3, None, metrics)
  assert read_json_lines(tmp_path / "metrics.jsonl") == []

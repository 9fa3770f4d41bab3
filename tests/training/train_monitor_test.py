import itertools
import re
import urllib.request

import numpy as np
from PIL import Image
import pytest

from cm3leon_jax.files.json_files import read_json_lines
from cm3leon_jax.training.watch.flops import model_flops
from tests.distributed_test import free_port
from tests.training import events
from tests.training.runs import MODEL, Crash, crash_at, losses, run
from tests.training.watch.traces_test import traced_steps


@pytest.mark.slow
def test_prometheus_reads_a_run_while_it_trains(loader, tmp_path):
  """Reads during the sample grid of step 8, because the endpoint exists only during training."""
  port, found = free_port(), []

  def scrape(*_):
    with urllib.request.urlopen(f"http://localhost:{port}/metrics", timeout=10) as answer:
      found.append(dict(re.findall(r"^cm3leon_(\w+) (\S+)$", answer.read().decode(), flags=re.M)))

  run(tmp_path, loader, sample_grid=scrape, sample_every=8, steps=8, metrics_port=port)
  [values] = [{name: float(x) for name, x in values.items()} for values in found]
  assert (values["step"], values["steps"]) == (8, 8)
  assert values["loss"] == losses(tmp_path)[8]
  assert 0 < values["goodput_ratio"] < 1
  assert values["tokens_per_second"] > 0
  assert 0 < values["seconds_since_last_step"] < 60
  with pytest.raises(OSError, match="refused"):
    scrape()


def test_tensorboard_shows_every_step_of_a_killed_run_once(loader, tmp_path):
  with pytest.raises(Crash):
    run(tmp_path, loader, sample_grid=crash_at(7, tmp_path), sample_every=1)
  grid = Image.new("RGB", (8, 4), "red")
  run(tmp_path, loader, steps=8, sample_grid=lambda *_: grid, sample_every=8)
  found = events.read(tmp_path / "tensorboard")
  assert {step: len(values) for step, values in found["train/loss"].items()} == dict.fromkeys(
    range(1, 9), 1
  )
  assert found["train/loss"] == {
    step: [np.float32(loss)] for step, loss in losses(tmp_path).items()
  }
  assert sorted(found["heldout/image_loss"]) == [5, 8]
  assert [(image.width, image.height) for image in found["samples"][8]] == [(8, 4)]


@pytest.mark.slow
def test_goodput_is_printed_and_summed_over_starts(loader, tmp_path, capsys):
  with pytest.raises(Crash):
    run(tmp_path, loader, sample_grid=crash_at(7, tmp_path), sample_every=1, fresh=True)
  run(tmp_path, loader, steps=8, tensorboard=False, fresh=True)
  lines = [
    line for line in read_json_lines(tmp_path / "metrics" / "metrics.jsonl") if "goodput" in line
  ]
  # Lines of saves at steps 4 and 8, evaluations at steps 5 and 8, and the end of the run.
  assert [line["step"] for line in lines] == [4, 5, 8, 8, 8]
  for before, line in itertools.pairwise(lines):
    assert all(line[name] >= before[name] for name in line if name.endswith("_seconds"))
  assert lines[0]["lost_seconds"] == 0 < lines[-1]["lost_seconds"]
  total = sum(x for name, x in lines[-1].items() if name.endswith("_seconds"))
  assert lines[-1]["goodput"] == pytest.approx(lines[-1]["step_seconds"] / total, abs=1e-3)
  printed = re.search(r"train: goodput (.*)% of (\d+) s: steps", capsys.readouterr().out)
  assert float(printed[1]) == pytest.approx(100 * lines[-1]["goodput"], abs=0.06)  # 1 decimal.
  assert int(printed[2]) == pytest.approx(total, abs=0.51)


@pytest.mark.slow
def test_a_trace_holds_the_chosen_steps_and_no_others(loader, tmp_path):
  run(tmp_path, loader, steps=6, profile_steps=range(3, 5))
  assert traced_steps(tmp_path / "profile") == [3, 4]


@pytest.mark.slow
def test_mfu_is_that_of_the_whole_batch(loader, tmp_path):
  run(tmp_path, loader, steps=2, peak_flops=1e9, tensorboard=False)
  lines = read_json_lines(tmp_path / "metrics" / "metrics.jsonl")
  (line,) = [line for line in lines if "mfu" in line]
  seconds = line["weight"] / line["tokens_per_second"]
  tokens = 8 * loader.plan.config.sequence_length
  assert line["mfu"] == pytest.approx(
    model_flops(MODEL, tokens, tokens // 8) / seconds / 1e9, rel=1e-2
  )

import numpy as np
from PIL import Image
import pytest

from tests.training import events
from tests.training.runs import Crash, crash_at, losses, run


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

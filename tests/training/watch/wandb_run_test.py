"""Tests calls of a fake wandb. docs/monitoring.md lists tests with the real wandb."""

import sys
import types

from PIL import Image
import pytest

from cm3leon_jax.files.json_files import read_json
from cm3leon_jax.training.watch.wandb_run import WandbRun


@pytest.fixture
def calls(monkeypatch):
  """Returns a list that records all calls of the fake module with their arguments."""
  found = []
  run = types.SimpleNamespace(
    log=lambda values, step: found.append((step, values)), finish=lambda: found.append("finished")
  )
  wandb = types.ModuleType("wandb")
  wandb.init = lambda **kwargs: found.append(kwargs) or run
  wandb.Image = lambda sheet: ("image", sheet)
  monkeypatch.setitem(sys.modules, "wandb", wandb)
  return found


def test_every_start_continues_the_same_run(calls, tmp_path):
  """The first start names the wandb run after the folder; later starts keep the name."""
  folder = tmp_path / "7b" / "train"
  for steps in (1, 2):
    WandbRun(folder, "cats", {"train": {"steps": steps}}).close()
  first, finished, second, _ = calls
  same = {
    "project": "cats", "id": read_json(folder / "wandb.json")["id"], "resume": "allow",
    "dir": str(folder), "entity": None,
  }  # fmt: skip
  assert first == {**same, "name": "7b", "config": {"train": {"steps": 1}}}
  assert second == {**same, "name": None, "config": {"train": {"steps": 2}}}
  assert finished == "finished"
  WandbRun(tmp_path / "other", "cats", {})
  assert calls[-1]["id"] != first["id"]


def test_a_project_may_belong_to_a_team(calls, tmp_path):
  WandbRun(tmp_path, "our-team/cats", {})
  assert (calls[-1]["entity"], calls[-1]["project"]) == ("our-team", "cats")


def test_curves_and_samples_are_logged_at_their_step(calls, tmp_path):
  run = WandbRun(tmp_path, "cats", {})
  run.scalars(3, {"loss": 2.0, "heldout_loss": 3.0, "weight": 9.0})
  sheet = Image.new("RGB", (2, 2))
  run.samples(3, sheet)
  assert calls[1:] == [
    (3, {"train/loss": 2.0, "heldout/loss": 3.0}),
    (3, {"samples": ("image", sheet)}),
  ]

"""Tests boards, with calls of a fake wandb. docs/monitoring.md lists tests with the real one."""

import contextlib
import io
import re
import socket
import sys
import threading
import types
import urllib.request

from etils import epath
import numpy as np
from PIL import Image
import pytest

from cm3leon_jax.config.training import TrainConfig
from cm3leon_jax.extras import install
from cm3leon_jax.files.json_files import read_json, write_json
from cm3leon_jax.training.watch import boards
from cm3leon_jax.training.watch.boards import Board, open_boards
from cm3leon_jax.training.watch.goodput import Stopwatch
from tests.training import events


@pytest.fixture
def watch():
  with contextlib.closing(Stopwatch()) as watch:
    yield watch


class Failing:
  """Board with one method that raises an error."""

  def __init__(self, method, calls):
    self._method, self.calls = method, calls

  def __getattr__(self, name):
    def call(*_):
      self.calls.append(name)
      if name == self._method:
        raise RuntimeError("no\nroute to host")

    return call


def use(board):
  board.scalars(1, {})
  board.samples(1, Image.new("RGB", (2, 2)))
  board.flush()
  board.close()


METHODS = ["scalars", "samples", "flush", "close"]


@pytest.mark.parametrize("method", ["samples", "close"])
def test_a_board_that_fails_in_the_middle_is_one_line_and_then_off(method, capsys):
  calls = []
  board = Board("board", lambda: Failing(method, calls), "plug it in")
  use(board)
  use(board)
  line = "train: warning: no board from here on (RuntimeError: no route to host): plug it in.\n"
  assert capsys.readouterr().out == line
  assert calls == METHODS[: METHODS.index(method) + 1]


def test_a_board_that_does_not_close_is_left(monkeypatch, capsys):
  monkeypatch.setattr(boards, "CLOSE_SECONDS", 0.1)
  stop = threading.Event()
  closing = types.SimpleNamespace(close=stop.wait)
  board = Board("board", lambda: closing, "plug it in", command="train_vqgan")
  board.close()
  stop.set()
  line = "train_vqgan: warning: no board from here on (not finished after 0.1 s, its"
  assert capsys.readouterr().out.startswith(line)


def test_a_board_whose_package_is_missing_is_one_line(tmp_path, watch, capsys, monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", None)
  config = TrainConfig(wandb="cats", tensorboard=False)
  [board] = open_boards(epath.Path(tmp_path), config, 1, watch)
  use(board)
  (line,) = capsys.readouterr().out.splitlines()
  assert line.startswith("train: warning: no Weights & Biases from here on (ModuleNotFoundError: ")
  assert install("monitoring") in line


def test_tensorboard_without_its_package_is_off_without_a_word(
  tmp_path, watch, capsys, monkeypatch
):
  monkeypatch.setitem(sys.modules, "tensorboardX", None)
  assert open_boards(epath.Path(tmp_path), TrainConfig(), 1, watch) == []
  assert capsys.readouterr().out == ""


def test_tensorboard_has_the_settings_of_the_run(tmp_path, watch):
  write_json(tmp_path / "config.json", {"run": {}, "settings": {"train": {"steps": 7}}})
  [board] = open_boards(epath.Path(tmp_path), TrainConfig(), 1, watch)
  board.close()
  [text] = events.read(tmp_path / "tensorboard")["config/text_summary"][1]
  assert text == '    {\n     "train": {\n      "steps": 7\n     }\n    }'


def test_scalars_have_their_groups_and_the_rest_stays_out(tmp_path):
  writer = boards.tensorboard(tmp_path, 1)
  writer.scalars(1, {"loss": 2.5, "weight": 8.0, "time": 1e9, "step_seconds": 1.0})
  writer.scalars(1, {"heldout_image_loss": 1.5})
  writer.close()
  assert events.read(tmp_path) == {"train/loss": {1: [2.5]}, "heldout/image_loss": {1: [1.5]}}


def test_a_resumed_run_hides_what_the_killed_one_wrote_beyond_its_checkpoint(tmp_path):
  writer = boards.tensorboard(tmp_path, 1)
  for step in range(1, 6):
    writer.scalars(step, {"loss": float(step)})
  writer.close()
  writer = boards.tensorboard(tmp_path, 4)
  for step in range(4, 8):
    writer.scalars(step, {"loss": 10.0 * step})
  writer.close()
  # The restart in the same second wrote a second file.
  assert len(list(tmp_path.iterdir())) == 2
  assert events.read(tmp_path)["train/loss"] == {
    1: [1],
    2: [2],
    3: [3],
    4: [40],
    5: [50],
    6: [60],
    7: [70],
  }


def test_a_grid_of_samples_is_what_it_was(tmp_path):
  sheet = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
  writer = boards.tensorboard(tmp_path, 1)
  writer.samples(7, Image.fromarray(sheet))
  writer.close()
  (image,) = events.read(tmp_path)["samples"][7]
  np.testing.assert_array_equal(
    np.asarray(Image.open(io.BytesIO(image.encoded_image_string))), sheet
  )


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
    boards.weights_and_biases(folder, "cats", {"train": {"steps": steps}}).close()
  first, finished, second, _ = calls
  same = {
    "project": "cats", "id": read_json(folder / "wandb.json")["id"], "resume": "allow",
    "dir": str(folder), "entity": None,
  }  # fmt: skip
  assert first == {**same, "name": "7b", "config": {"train": {"steps": 1}}}
  assert second == {**same, "name": None, "config": {"train": {"steps": 2}}}
  assert finished == "finished"
  boards.weights_and_biases(tmp_path / "other", "cats", {})
  assert calls[-1]["id"] != first["id"]


def test_a_project_may_belong_to_a_team(calls, tmp_path):
  boards.weights_and_biases(tmp_path, "our-team/cats", {})
  assert (calls[-1]["entity"], calls[-1]["project"]) == ("our-team", "cats")


def test_curves_and_samples_are_logged_at_their_step(calls, tmp_path):
  run = boards.weights_and_biases(tmp_path, "cats", {})
  run.scalars(3, {"loss": 2.0, "heldout_loss": 3.0, "weight": 9.0})
  sheet = Image.new("RGB", (2, 2))
  run.samples(3, sheet)
  assert calls[1:] == [
    (3, {"train/loss": 2.0, "heldout/loss": 3.0}),
    (3, {"samples": ("image", sheet)}),
  ]


def free_port():
  with socket.socket() as taken:
    taken.bind(("", 0))
    return taken.getsockname()[1]


def get(port):
  with urllib.request.urlopen(f"http://localhost:{port}/metrics", timeout=10) as answer:
    return answer.read().decode()


def values(text):
  return {name: float(x) for name, x in re.findall(r"^(\w+) (\S+)$", text, flags=re.M)}


def test_prometheus_reads_the_last_values_and_closing_frees_the_port():
  now, port = [100.0], free_port()
  clock = lambda: now[0]  # noqa: E731
  with (
    contextlib.closing(Stopwatch(clock)) as watch,
    contextlib.closing(boards.prometheus(port, 60, watch, clock)) as board,
  ):
    now[0] += 5.0
    assert values(get(port)) == {"cm3leon_steps": 60.0, "cm3leon_seconds_since_last_step": 5.0}
    board.scalars(3, {"loss": 2.5, "weight": 8.0, "tokens_per_second": 4_620.0})
    now[0] += 10.0
    board.scalars(3, {"heldout_loss": 3.25, "time": 1e9})
    assert values(get(port)) == {
      "cm3leon_step": 3.0,
      "cm3leon_steps": 60.0,
      "cm3leon_loss": 2.5,
      "cm3leon_heldout_loss": 3.25,
      "cm3leon_tokens_per_second": 4_620.0,
      "cm3leon_goodput_ratio": 0.0,  # 0, because the run has spent all its time on restoring.
      "cm3leon_seconds_since_last_step": 10.0,
    }
    with pytest.raises(OSError, match="in use"):
      boards.prometheus(port, 60, watch)
  with contextlib.closing(Stopwatch()) as watch:
    boards.prometheus(port, 60, watch).close()

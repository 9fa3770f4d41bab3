import contextlib
import sys
import threading
import types

from etils import epath
from PIL import Image
import pytest

from cm3leon_jax.config.training import TrainConfig
from cm3leon_jax.extras import install
from cm3leon_jax.files.json_files import write_json
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

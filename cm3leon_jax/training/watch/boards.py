"""Opens boards (TensorBoard, Weights & Biases, Prometheus). If one fails, the run continues."""

from collections.abc import Callable
import importlib.util
import threading
from typing import Any

from etils import epath
from PIL import Image

from cm3leon_jax import extras
from cm3leon_jax.config.training import TrainConfig
from cm3leon_jax.files.json_files import read_json
from cm3leon_jax.training.watch.goodput import Stopwatch
from cm3leon_jax.training.watch.prometheus import Prometheus
from cm3leon_jax.training.watch.tensorboard_board import TensorBoard
from cm3leon_jax.training.watch.wandb_run import WandbRun

CLOSE_SECONDS = 120.0  # A server may delay the last points.


class Board:
  """Wraps a board, which displays a run. If a call fails, warns and disables the board."""

  def __init__(self, name: str, make: Callable[[], Any], instead: str, command: str = "train"):
    """Opens a board.

    The warning about a failing board starts with `command` and ends with `instead`, which says what
    the user can do.
    """
    self._name, self._command = name, command
    self._instead: str | None = instead  # None: the board is disabled.
    self._board = self._attempt(make)

  def scalars(self, step: int, values: dict) -> None:
    """Shows a line of metrics.jsonl."""
    self._attempt(lambda: self._board.scalars(step, values))

  def samples(self, step: int, sheet: Image.Image) -> None:
    """Shows a grid of samples, a PIL image."""
    self._attempt(lambda: self._board.samples(step, sheet))

  def flush(self) -> None:
    """Writes buffered values."""
    self._attempt(lambda: self._board.flush())

  def close(self) -> None:
    """Closes the board. Waits at most CLOSE_SECONDS."""
    thread = threading.Thread(
      target=self._attempt, args=(lambda: self._board.close(),), daemon=True
    )
    thread.start()
    thread.join(CLOSE_SECONDS)
    if thread.is_alive():
      self._warn(f"not finished after {CLOSE_SECONDS:g} s, its last points may be missing")

  def _attempt(self, function: Callable[[], Any]) -> Any:
    if self._instead is None:
      return None
    try:
      return function()
    except Exception as error:  # Errors of a server, a network or a package must not end a run.
      self._warn(f"{type(error).__name__}: {error}")

  def _warn(self, reason: str) -> None:
    reason = " ".join(reason.split())[:300]
    print(
      f"{self._command}: warning: no {self._name} from here on ({reason}): {self._instead}.",
      flush=True,
    )
    self._instead = None


def open_boards(
  folder: epath.Path, config: TrainConfig, first_step: int, watch: Stopwatch
) -> list[Board]:
  """Opens the boards that the config enables. Prints a warning for each board that fails to open.

  TensorBoard, which is on by default, is left out without a warning if its package is missing. The
  boards also show the settings in the config.json of `folder`.
  """
  path = folder / "config.json"
  settings = read_json(path, {"settings": dict})["settings"] if path.exists() else {}
  install = extras.install("monitoring")
  boards = []
  if config.wandb:
    boards.append(
      Board(
        "Weights & Biases",
        lambda: WandbRun(folder, config.wandb, settings),
        f"{install}, set WANDB_API_KEY, or leave out config.train.wandb = '{config.wandb}'",
      )
    )
  if config.tensorboard and importlib.util.find_spec("tensorboardX"):
    boards.append(
      Board(
        "TensorBoard",
        lambda: TensorBoard(folder / "tensorboard", first_step, settings),
        f"{install}, or set --config.train.tensorboard=False",
      )
    )
  if config.metrics_port:
    boards.append(
      Board(
        "metrics for Prometheus",
        lambda: Prometheus(config.metrics_port, config.steps, watch),
        f"set config.train.metrics_port = {config.metrics_port} to a free port",
      )
    )
  return boards

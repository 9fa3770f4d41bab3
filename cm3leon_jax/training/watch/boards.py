"""Shows a run on boards: TensorBoard, Weights & Biases, Prometheus. A board that fails is left."""

from collections.abc import Callable
import dataclasses
import functools
import importlib
import importlib.util
import json
import os
import threading
import time
from typing import Any
import uuid

from etils import epath
import numpy as np
from PIL import Image

from cm3leon_jax import extras
from cm3leon_jax.config.training import TrainConfig
from cm3leon_jax.files.json_files import read_json, write_json
from cm3leon_jax.training.watch.goodput import Stopwatch, goodput

CLOSE_SECONDS = 120.0  # A server may delay the last points.
FLUSH_SECONDS = 30
FOLDER = "tensorboard"
SCALARS = (
  *("loss", "image_loss", "text_loss", "grad_norm", "learning_rate", "tokens_per_second", "mfu"),
  *("goodput", "mse", "perplexity", "codes_used", "discriminator_loss", "adversarial_weight"),
)
# Key of a value in a metrics line -> help text of the metric that Prometheus reads.
GAUGES = {
  "step": "Last logged step.",
  "steps": "Steps of the whole run.",
  "loss": "Loss of that step, nats per target.",
  "heldout_loss": "Last held-out loss, nats per target.",
  "tokens_per_second": "Targets per second, all devices together.",
  "goodput_ratio": "Share of steps in the wall time of all starts.",
}


def curves(values: dict) -> dict[str, float]:
  """Selects the values of a metrics line that are shown as curves, and renames them.

  {"loss": 2.5, "weight": 8.0, "heldout_image_loss": 1.5} ->
  {"train/loss": 2.5, "heldout/image_loss": 1.5}
  {"loss/draw": 2.1, "heldout_loss/draw": 2.0} is returned unchanged.
  """
  heldout = {
    f"heldout/{k.removeprefix('heldout_')}": x
    for k, x in values.items()
    if k.startswith("heldout_") and "/" not in k
  }
  by_source = {k: x for k, x in values.items() if "/" in k}
  return heldout | by_source | {f"train/{k}": x for k, x in values.items() if k in SCALARS}


@dataclasses.dataclass(frozen=True)
class Writer:
  """Functions of an open board: `scalars(step, values)`, `samples(step, sheet)` and the end."""

  scalars: Callable[[int, dict], Any]
  close: Callable[[], Any]
  samples: Callable[[int, Image.Image], Any] = lambda step, sheet: None
  flush: Callable[[], Any] = lambda: None


def tensorboard(folder: epath.PathLike, first_step: int, settings: dict | None = None) -> Writer:
  """Opens an event file. For a folder in a GCS bucket, google-cloud-storage must be installed.

  Args:
    first_step: first step of this start. TensorBoard hides events of earlier starts from this step
      on.
    settings: shown as the text `config`, one line per field.

  Raises:
    ImportError: tensorboardX, or google-cloud-storage for a GCS bucket, is not installed.
  """
  import tensorboardX  # An optional dependency.

  if os.fspath(folder).startswith("gs://"):
    importlib.import_module("google.cloud.storage")  # Fail now; tensorboardX would fail later.
  # The suffix makes file names unique. Their time stamp has a resolution of one second, and an
  # existing file would be overwritten.
  suffix = f".{os.getpid()}.{first_step}"
  writer = tensorboardX.SummaryWriter(
    os.fspath(folder), purge_step=first_step, flush_secs=FLUSH_SECONDS, filename_suffix=suffix
  )
  if settings:
    lines = json.dumps(settings, indent=1).splitlines()
    writer.add_text("config", "\n".join(f"    {line}" for line in lines), first_step)

  def scalars(step: int, values: dict) -> None:
    for tag, value in curves(values).items():
      writer.add_scalar(tag, value, step)

  def samples(step: int, sheet: Image.Image) -> None:
    writer.add_image("samples", np.asarray(sheet), step, dataformats="HWC")

  return Writer(scalars, writer.close, samples, writer.flush)


def weights_and_biases(folder: epath.PathLike, project: str, settings: dict) -> Writer:
  """Starts a run of Weights & Biases, or continues the one in `folder/wandb.json`.

  Weights & Biases ignores values for a step that it already has, so a step that a resumed training
  computes again appears only once. wandb's environment variables apply, such as WANDB_ENTITY,
  WANDB_TAGS and WANDB_NAME.

  Args:
    folder: the folder of the training. If it is local, wandb writes its files to `folder/wandb/`.
      The run is named WANDB_NAME or, by default, after the parent of `folder`.
    project: PROJECT or ENTITY/PROJECT; an entity is a user or a team.

  Raises:
    ImportError: wandb is not installed.
    Exception: wandb is not logged in, or cannot reach its server.
  """
  import wandb  # Optional dependency, only for config.train.wandb.

  path, local = epath.Path(folder) / "wandb.json", "://" not in os.fspath(folder)
  name = None  # An existing run keeps its name, which users may have changed.
  if new := not path.exists():
    name = os.environ.get("WANDB_NAME") or epath.Path(folder).parent.name
  known = {"id": uuid.uuid4().hex[:8]} if new else read_json(path, {"id": str})
  entity, _, project = project.rpartition("/")
  run = wandb.init(
    project=project,
    entity=entity or None,  # None: WANDB_ENTITY, or the account's default entity.
    id=known["id"],
    name=name,
    config=settings,
    resume="allow",
    dir=os.fspath(folder) if local else None,
  )
  if new:
    write_json(path, known)
  return Writer(
    lambda step, values: run.log(curves(values), step=step),
    run.finish,
    lambda step, sheet: run.log({"samples": wandb.Image(sheet)}, step=step),
  )


def prometheus(
  port: int, steps: int, watch: Stopwatch, clock: Callable[[], float] = time.monotonic
) -> Writer:
  """Serves the `GAUGES` on all network interfaces, to anyone who can reach the port.

  Raises:
    OSError: another program uses the port.
  """
  from prometheus_client import CollectorRegistry, Gauge, start_http_server

  registry, stepped = CollectorRegistry(), [clock()]
  idle = "Seconds since a step was logged, or since the start."
  Gauge("cm3leon_seconds_since_last_step", idle, registry=registry).set_function(
    lambda: clock() - stepped[0]
  )
  gauge = functools.cache(lambda name: Gauge(f"cm3leon_{name}", GAUGES[name], registry=registry))
  gauge("steps").set(steps)
  server, thread = start_http_server(port, registry=registry)

  def scalars(step: int, values: dict) -> None:
    values = {**values, "step": step, "goodput_ratio": goodput(watch.seconds())}
    for name in GAUGES.keys() & values.keys():
      gauge(name).set(values[name])
    if "loss" in values:
      stepped[0] = clock()

  def close() -> None:
    server.shutdown()
    server.server_close()
    thread.join()

  return Writer(scalars, close)


class Board:
  """A board that a training shows its metrics on. If a call fails, warns and leaves the board."""

  def __init__(self, name: str, make: Callable[[], Writer], instead: str, command: str = "train"):
    """Opens a board.

    The warning about a failing board starts with `command` and ends with `instead`, which says what
    the user can do.
    """
    self._name, self._command = name, command
    self._instead: str | None = instead  # None: the board is left.
    self._writer = self._attempt(make)

  def scalars(self, step: int, values: dict) -> None:
    """Shows a line of metrics.jsonl."""
    self._attempt(lambda: self._writer.scalars(step, values))

  def samples(self, step: int, sheet: Image.Image) -> None:
    """Shows a grid of samples, a PIL image."""
    self._attempt(lambda: self._writer.samples(step, sheet))

  def flush(self) -> None:
    """Writes buffered values."""
    self._attempt(lambda: self._writer.flush())

  def close(self) -> None:
    """Closes the board. Waits at most CLOSE_SECONDS."""
    thread = threading.Thread(
      target=self._attempt, args=(lambda: self._writer.close(),), daemon=True
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


def open_tensorboard(
  folder: epath.Path, first_step: int, settings: dict | None = None, command: str = "train"
) -> list[Board]:
  """Opens TensorBoard in `folder/tensorboard/`. Returns [] if its package is not installed."""
  if not importlib.util.find_spec("tensorboardX"):
    return []
  make = functools.partial(tensorboard, folder / FOLDER, first_step, settings)
  return [Board("TensorBoard", make, "set --config.train.tensorboard=False", command)]


def open_boards(
  folder: epath.Path, config: TrainConfig, first_step: int, watch: Stopwatch
) -> list[Board]:
  """Opens the boards that the config enables. Prints a warning for each board that fails to open.

  The boards also show the settings in the config.json of `folder`.
  """
  path = folder / "config.json"
  settings = read_json(path, {"settings": dict})["settings"] if path.exists() else {}
  boards = open_tensorboard(folder, first_step, settings) if config.tensorboard else []
  if config.wandb:
    make = functools.partial(weights_and_biases, folder, config.wandb, settings)
    remedy = f"set WANDB_API_KEY, or leave out config.train.wandb = '{config.wandb}'"
    boards.append(Board("Weights & Biases", make, f"{extras.install('monitoring')}, {remedy}"))
  if config.metrics_port:
    make = functools.partial(prometheus, config.metrics_port, config.steps, watch)
    remedy = f"set config.train.metrics_port = {config.metrics_port} to a free port"
    boards.append(Board("metrics for Prometheus", make, remedy))
  return boards

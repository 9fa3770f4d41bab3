"""Logs to Weights & Biases the same curves and images that TensorBoard shows."""

import os
import uuid

from etils import epath
from PIL import Image

from cm3leon_jax.files.json_files import read_json, write_json
from cm3leon_jax.training.watch.tensorboard_board import curves


class WandbRun:
  """One run of Weights & Biases for all starts of a training; its id is in `folder/wandb.json`.

  Weights & Biases ignores values for a step that it already has. So a step that a resumed training
  computes again appears only once.
  """

  def __init__(self, folder: epath.PathLike, project: str, settings: dict):
    """Starts or continues the run.

    wandb's environment variables apply, such as WANDB_ENTITY, WANDB_TAGS and WANDB_NAME.

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
    found = {"id": uuid.uuid4().hex[:8]} if new else read_json(path, {"id": str})
    self._wandb = wandb
    entity, _, project = project.rpartition("/")
    self._run = wandb.init(
      project=project,
      entity=entity or None,  # None: WANDB_ENTITY, or the account's default entity.
      id=found["id"],
      name=name,
      config=settings,
      resume="allow",
      dir=os.fspath(folder) if local else None,
    )
    if new:
      write_json(path, found)

  def scalars(self, step: int, values: dict) -> None:
    """Logs the `curves` of a metrics line."""
    self._run.log(curves(values), step=step)

  def samples(self, step: int, sheet: Image.Image) -> None:
    """Logs a grid of samples, a PIL image."""
    self._run.log({"samples": self._wandb.Image(sheet)}, step=step)

  def flush(self) -> None:
    """Does nothing, because wandb sends values without a flush."""

  def close(self) -> None:
    self._run.finish()

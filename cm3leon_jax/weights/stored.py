"""Reads the parameters of a checkpoint in slices, so that they need not all fit in host memory.

Orbax stores an array in chunks, and TensorStore always reads and decodes whole chunks. Each layer
of the stacked parameters has separate chunks (`save_args`), so one layer can be read without the
others.
"""

from collections.abc import Callable, Mapping
import dataclasses
import math
import os
from typing import Any

from etils import epath
from flax import traverse_util
import jax
from jaxtyping import Array, PyTree
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from cm3leon_jax.errors import UserError
from cm3leon_jax.files.atomic import absolute

STACKED = "blocks"  # Key of the parameters whose leading axis is the layer.


@dataclasses.dataclass(frozen=True)
class StoredParams:
  """Parameters that are read only when they are needed, as fp32.

  Attributes:
    shapes: dotted name -> shape. The first axis of arrays under `blocks` is the layer.
    read: (name, *index) -> array. `index` contains integers for the first axes.

      read("blocks.up", 3)  # [D, F], the parameter of layer 3.
  """

  step: int
  averaged: bool
  shapes: Mapping[str, tuple[int, ...]]
  read: Callable[..., np.ndarray]

  @property
  def count(self) -> int:
    """Total number of elements."""
    return sum(math.prod(shape) for shape in self.shapes.values())


def of_tree(params: dict, step: int = 0, averaged: bool = False) -> StoredParams:
  """Wraps parameters that are already in memory, on any mesh."""
  flat = traverse_util.flatten_dict(params, sep=".")

  def read(name: str, *index: int) -> np.ndarray:
    return np.asarray(jax.device_get(flat[name])[index], np.float32)

  shapes = {name: tuple(x.shape) for name, x in flat.items()}
  return StoredParams(step, averaged, shapes, read)


def save_args(state: PyTree) -> Any:
  """Returns Orbax's arguments for saving. Each layer of stacked parameters gets separate chunks."""

  def args(path: tuple, x: Array | np.ndarray | np.generic) -> ocp.SaveArgs:
    stacked = any(getattr(key, "key", None) == STACKED for key in path) and x.ndim > 1
    return ocp.SaveArgs(shard_axes=(0,)) if stacked else ocp.SaveArgs()

  return jax.tree.map_with_path(args, state)


def restore_args(folder: epath.PathLike, types: dict, average: bool | None) -> tuple[str, Any]:
  """Chooses the tree of a state to restore. Returns its name and Orbax's restore arguments.

  `folder` is the folder of the state, STEP/state. For `average`, see `choose`.
  """
  name = choose(folder, average)[0]
  args = ocp.args.PyTreeRestore(
    item={name: types},
    restore_args=ocp.checkpoint_utils.construct_restore_args({name: types}),
    partial_restore=True,
  )
  return name, args


def array_spec(folder: epath.Path, name: str) -> dict:
  """Returns TensorStore's spec of an array that Orbax wrote.

  `folder` is absolute. `name` consists of the array's keys in its tree, joined by dots.
  """
  url = os.fspath(folder) if "://" in os.fspath(folder) else f"file://{folder}"
  return {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": f"{url}/", "path": f"{name}/"}}


def open_state(folder: epath.PathLike, average: bool | None) -> StoredParams:
  """Opens the parameters of a state that Orbax wrote.

  `folder` is STEP/state. For `average`, see `choose`.

  Raises:
    UserError: see `choose`.
  """
  folder = absolute(folder)
  tree, arrays = choose(folder, average)

  def read(name: str, *index: int) -> np.ndarray:
    spec = array_spec(folder, f"{tree}.{name}")
    array = tensorstore.open(spec, open=True, read=True).result()
    return np.asarray(array[index].read().result(), np.float32)

  flat = traverse_util.flatten_dict(arrays, sep=".")
  shapes = {name: tuple(x.shape) for name, x in flat.items()}
  return StoredParams(int(folder.parent.name), tree == "ema", shapes, read)


def choose(folder: epath.PathLike, average: bool | None) -> tuple[str, dict]:
  """Chooses which parameters of a state to read. Returns "ema" or "params", and its Orbax metadata.

  `folder` is STEP/state. If `average` is None, chooses the average if the state has one.

  Raises:
    UserError: `average` is not None, but the run keeps no average.
  """
  folder = epath.Path(folder)
  described = ocp.StandardCheckpointHandler().metadata(folder)
  if average is not None and not described.get("ema"):
    raise UserError(
      f"checkpoint {folder.parent.name} in {folder.parents[2]} has no average of the parameters "
      "(config.optimizer.ema_decay), so its last parameters are the only ones."
    )
  tree = "ema" if described.get("ema") and average is not False else "params"
  return tree, described[tree]

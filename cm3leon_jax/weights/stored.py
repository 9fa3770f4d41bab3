"""Parameters of a checkpoint, read from disk in slices: a host need not hold them all.

Orbax stores an array in chunks, which TensorStore reads and decodes whole. The layers of stacked
parameters have chunks of their own (`save_args`), so a layer is read without the others. In a
checkpoint of an earlier version a chunk spans all layers of a device's share: a layer is read from
it all the same, but the chunk is decoded for every layer.
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

from cm3leon_jax.config import UserError
from cm3leon_jax.files.atomic import absolute

STACKED = "blocks"  # Parameters of all layers, on a leading axis.


@dataclasses.dataclass(frozen=True)
class StoredParams:
  """Parameters that are read when they are needed, fp32.

  Attributes:
    step: of the checkpoint.
    averaged: whether they are the moving average.
    shapes: dotted name -> shape; arrays of `blocks` have the layers as their first axis.
    read: (name, *index) -> array; an index is a whole number for each of the first axes.

      read("blocks.up", 3)  # [D, F], of layer 3.
  """

  step: int
  averaged: bool
  shapes: Mapping[str, tuple[int, ...]]
  read: Callable[..., np.ndarray]

  @property
  def count(self) -> int:
    """Number of elements of all parameters."""
    return sum(math.prod(shape) for shape in self.shapes.values())


def of_tree(params: dict, step: int = 0, averaged: bool = False) -> StoredParams:
  """Returns parameters that are in memory already, on any mesh."""
  flat = traverse_util.flatten_dict(params, sep=".")

  def read(name: str, *index: int) -> np.ndarray:
    return np.asarray(jax.device_get(flat[name])[index], np.float32)

  shapes = {name: tuple(x.shape) for name, x in flat.items()}
  return StoredParams(step, averaged, shapes, read)


def tree_of(params: StoredParams) -> dict:
  """Reads all parameters into the host's memory."""
  flat = {name: params.read(name) for name in params.shapes}
  return traverse_util.unflatten_dict(flat, sep=".")


def save_args(state: PyTree) -> Any:
  """Returns Orbax's arguments to save a state: each layer of stacked parameters is stored apart."""

  def args(path: tuple, x: Array | np.ndarray | np.generic) -> ocp.SaveArgs:
    stacked = any(getattr(key, "key", None) == STACKED for key in path) and x.ndim > 1
    return ocp.SaveArgs(shard_axes=(0,)) if stacked else ocp.SaveArgs()

  return jax.tree.map_with_path(args, state)


def restore_args(folder: epath.PathLike, types: dict, average: bool | None) -> tuple[str, Any]:
  """Returns which tree of a state to restore, see `choose`, and Orbax's arguments for it alone.

  Args:
    folder: of the state, STEP/state.
    types: of the parameters, with shardings.
    average: see `choose`.
  """
  name = choose(folder, average)[0]
  args = ocp.args.PyTreeRestore(
    item={name: types},
    restore_args=ocp.checkpoint_utils.construct_restore_args({name: types}),
    partial_restore=True,
  )
  return name, args


def array_spec(folder: epath.Path, name: str) -> dict:
  """Returns TensorStore's description of an array in a folder that is laid out as Orbax does it.

  Args:
    folder: with the arrays, an absolute path.
    name: of the array, its keys joined by dots.
  """
  url = os.fspath(folder) if "://" in os.fspath(folder) else f"file://{folder}"
  return {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": f"{url}/", "path": f"{name}/"}}


def open_state(folder: epath.PathLike, average: bool | None) -> StoredParams:
  """Opens the parameters of a state that Orbax has written.

  Args:
    folder: of the state, STEP/state.
    average: see `choose`.

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
  """Returns the tree of a state to read, "ema" or "params", and Orbax's description of its arrays.

  Args:
    folder: of the state, STEP/state.
    average: whether to read the moving average; None: if there is one.

  Raises:
    UserError: `average` says which, and the run keeps no average, so there is no choice.
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

"""Trains the two small models, the image tokenizer (VQGAN) and CLIP; resumes a killed training.

The batch is sharded over the batch axes of the mesh. Large arrays of the state are sharded over the
fsdp axes, see `layout`. This module imports neither the models nor the data.
"""

# n examples, B batch.

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import functools
import itertools
import math
from typing import Any

from etils import epath
import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree
import numpy as np

from cm3leon_jax.errors import UserError
from cm3leon_jax.files.atomic import exists
from cm3leon_jax.files.json_files import plain, read_json, write_json
from cm3leon_jax.files.progress import progress_bar
from cm3leon_jax.mesh import RULES, batch_shards, spec
from cm3leon_jax.stages.stages import DONE, check_same_config, differences
from cm3leon_jax.training.faults.lease import Lease
from cm3leon_jax.training.faults.preemption import StopSignal, check_end
from cm3leon_jax.training.image_models.hooks import Lines, SmallSaves
from cm3leon_jax.training.loop import run_steps
from cm3leon_jax.training.watch.metrics import MetricsLog
from cm3leon_jax.weights import recovery
from cm3leon_jax.weights.checkpoint import Checkpoints
from cm3leon_jax.weights.reading import any_in

FOLDER = "training"
LOG_EVERY = 10
SPLIT_FROM = 2**16  # Smaller arrays are replicated, which saves the time to gather them.
OF_DATA = ("inputs", "examples:")  # Fields of a training's identity that describe the data.


@dataclasses.dataclass(frozen=True)
class SmallTraining:
  """Config, data and functions of a small model's training.

  Attributes:
    name: section of the config, for messages.
    config: dataclass of that section, with steps, batch_size and checkpoint_every.
    about: further settings that the result depends on. "inputs" contains the ids of the stages that
      the examples come from, see `stages.inputs`.
    examples: data in memory or on disk. len(examples) is n; examples[rows], with rows int64 [B], is
      a tree of host arrays [B, ...].
    folder: receives metrics.jsonl and, until `delete_checkpoints`, the checkpoints.
    init: () -> the initial state, a tree of arrays.
    step: (state, batch, i) -> state, metrics (scalars). Takes step i, counted from 0. It may donate
      the state if its jitted functions return `keep_layout(state)`.
    watch: shows the training, see `vqgan_watch.Watch`. The training calls log(step, values) after
      a line of metrics.jsonl, save(step, state) after a checkpoint, and close() at the end.
  """

  name: str
  config: Any
  about: dict
  seed: int
  examples: Any
  folder: epath.PathLike
  init: Callable[[], dict]
  step: Callable[[dict, Any, int], tuple[dict, dict]]
  watch: Any = None

  @property
  def identity(self) -> dict:
    """All settings that the result depends on, with the config under the name of its section."""
    fields = dataclasses.asdict(self.config)
    section = {field: value for field, value in fields.items() if field != "checkpoint_every"}
    return {self.name: section, **self.about, "seed": self.seed, "examples": len(self.examples)}


def train(training: SmallTraining) -> dict:
  """Trains to `config.steps` on the current mesh, from the newest checkpoint of a killed training.

  A step depends only on its number, the seed and the state, so the result of a resumed training is
  bitwise equal to the result of an uninterrupted one. If the number of steps or the data has
  changed, the training starts again. At SIGTERM and Ctrl-C it saves and exits with the exit code of
  `StopSignal`. Returns the last state, on the host.

  Raises:
    UserError: there are too few examples, the batch is not evenly divisible over the mesh, the
      folder contains a training with another config, all checkpoints are damaged, another job
      trains in the folder, or a metric or the state is not finite.
  """
  name, config, watch = training.name, training.config, training.watch
  _check_batch(name, config.batch_size, len(training.examples))
  mesh, folder = _mesh(), epath.Path(training.folder)
  with contextlib.ExitStack() as stack:
    stack.enter_context(jax.set_mesh(mesh))
    lease = stack.enter_context(Lease(folder))
    opened = _open_checkpoints(name, training.identity, folder / FOLDER, lease)
    checkpoints = stack.enter_context(opened)
    state, done = _restore(name, checkpoints, training.init)
    log = MetricsLog(folder, done or None)
    stop = stack.enter_context(StopSignal(mesh))
    remedy = f"lower config.{name}.learning_rate and delete {folder / FOLDER} to start again."
    if watch is not None:
      stack.callback(watch.close)
    steps = range(done + 1, config.steps + 1)
    bar = progress_bar(steps, name, config.steps, initial=done, unit="step")

    def show(step: int, values: dict[str, float]) -> None:
      if watch is not None:
        watch.log(step, values)
      bar.set_postfix({key: f"{x:.3f}" for key, x in values.items()}, refresh=False)

    lines = Lines(log, LOG_EVERY, config.steps, name, remedy, show)
    show_saved = None if watch is None else watch.save
    saves = SmallSaves(checkpoints, stop, name, config, remedy, done, show_saved)
    hooks = [lease, stop, lines, saves]
    batches = _batches(training, done, NamedSharding(mesh, spec("batch")))
    state = run_steps(bar, lambda state, batch: training.step(state, *batch), state, batches, hooks)
    check_end(saves.saved, config.steps, folder, stop.code, saves.saved)
    return jax.device_get(state)


def _batches(training: SmallTraining, first: int, split: NamedSharding) -> Iterator[tuple]:
  """Yields (batch, i) for each step i, starting at `first`; the first step of a training is 0."""
  for i in itertools.count(first):
    rows = batch_rows(i, len(training.examples), training.config.batch_size, training.seed)
    yield jax.device_put(training.examples[rows], split), i


def _mesh() -> Mesh:
  """Returns the current mesh with automatic axes, so that the compiler chooses shardings."""
  current = jax.sharding.get_mesh()
  return Mesh(current.devices, current.axis_names)


def layout(shape: tuple[int, ...]) -> P:
  """Returns how an array of the state is sharded over the fsdp axes of the current mesh.

  An array with at least `SPLIT_FROM` elements is sharded along its largest axis whose size is a
  multiple of the number of devices (the first of several equal axes). Other arrays are replicated.
  With 4 devices:

  (3, 3, 128, 64) -> P(None, None, ("fsdp", "fsdp_inner"), None)
  (3, 3, 8, 8) -> P()
  """
  sizes = jax.sharding.get_abstract_mesh().shape
  parts = math.prod(sizes[axis] for axis in RULES["largest"] or ())
  divisible = [i for i, size in enumerate(shape) if size % parts == 0]
  if math.prod(shape) < SPLIT_FROM or not divisible:
    return P()
  largest = max(divisible, key=lambda i: shape[i])
  return spec(*("largest" if i == largest else None for i in range(len(shape))))


def keep_layout(state: PyTree) -> PyTree:
  """Constrains the state that a jitted function returns to the shardings that `train` uses.

  The function can then donate its input state. Outside of `train`, where the mesh does not have
  automatic axes, returns the state unchanged.
  """
  if AxisType.Auto not in jax.sharding.get_abstract_mesh().axis_types:
    return state
  return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, layout(x.shape)), state)


def _shardings(tree: PyTree) -> PyTree:
  """Returns the NamedSharding of each array, or abstract array, of a state on the current mesh."""
  mesh = jax.sharding.get_mesh()
  return jax.tree.map(lambda x: NamedSharding(mesh, layout(x.shape)), tree)


def replicated(tree: PyTree) -> PyTree:
  """Replicates a tree of arrays, e.g. constant inputs of a step, over the current mesh."""
  return jax.device_put(tree, NamedSharding(_mesh(), P()))


def _check_batch(name: str, batch_size: int, num_examples: int) -> None:
  if num_examples < batch_size:
    raise UserError(
      f"config.{name}.batch_size is {batch_size}; there are only {num_examples} training images: "
      f"give --config.{name}.batch_size={num_examples}, or fewer."
    )
  if batch_size % batch_shards():
    raise UserError(
      f"config.{name}.batch_size is {batch_size}; "
      f"mesh.data x mesh.fsdp x mesh.fsdp_inner = {batch_shards()} must divide it."
    )


def _restore(name: str, checkpoints: Checkpoints, init: Callable[[], dict]) -> tuple[dict, int]:
  """Returns (state of the newest checkpoint, its step), or (`init()`, 0) without a checkpoint."""
  newest = recovery.newest_whole(checkpoints)
  if newest is None:
    state = init()
    return jax.device_put(state, _shardings(state)), 0
  print(f"{name}: continues from step {newest}.", flush=True)
  types = jax.eval_shape(init)
  types = jax.tree.map(lambda x, s: x.update(sharding=s), types, _shardings(types))
  state, _ = checkpoints.restore(types, newest)
  return state, newest


def _open_checkpoints(name: str, identity: dict, folder: epath.Path, lease: Lease) -> Checkpoints:
  """Opens the checkpoints of a training. Deletes them first if the steps or the data changed."""
  path = folder / "config.json"
  if exists(path):
    stored = read_json(path, {})
    changed = differences(stored, plain(identity))
    if changed and all(change.startswith((f"{name}.steps:", *OF_DATA)) for change in changed):
      changes = "; ".join(changed)
      print(f"warning: {name}: starts again, with other steps or data ({changes}).", flush=True)
      folder.rmtree()
    else:
      check_same_config(folder, stored, identity)
  elif any_in(folder):
    raise UserError(
      f"{path} is missing, but {folder} contains checkpoints, whose seed, data and settings this "
      f"file records. Restore it from a copy, or delete {folder} to start again."
    )
  write_json(path, identity)
  # Keep two, because the run needs the previous checkpoint until a save is complete.
  checkpoints = Checkpoints(folder, keep=2, check=lease.check)
  recovery.discard_unsealed(checkpoints)
  return checkpoints


def print_other_steps(name: str, folder: epath.PathLike, steps: int) -> None:
  """Prints what to do if a finished training has another number of steps than the config."""
  folder = epath.Path(folder)
  trained = read_json(folder / DONE, {"summary": dict})["summary"].get("steps", steps)
  if trained != steps:
    print(
      f"warning: {name}: kept as an earlier command trained it, for {trained:,} steps; "
      f"config.{name}.steps is now {steps:,}. To train it anew, delete {folder} and "
      f"{folder.parent / 'train'}.",
      flush=True,
    )


def delete_checkpoints(folder: epath.PathLike) -> None:
  """Deletes the checkpoints in `folder`, if there are any. Called after the stage is finished."""
  (epath.Path(folder) / FOLDER).rmtree(missing_ok=True)


def batch_rows(step: int, num_examples: int, batch_size: int, seed: int) -> np.ndarray:
  """Returns the rows that step `step` trains on, int64 [B].

  Every epoch is a new permutation of the examples. The examples after the last full batch of an
  epoch are left out.
  """
  epoch, i = divmod(step, num_examples // batch_size)
  return _permutation(epoch, num_examples, seed)[i * batch_size : (i + 1) * batch_size]


@functools.lru_cache(maxsize=1)
def _permutation(epoch: int, num_examples: int, seed: int) -> np.ndarray:
  return np.random.default_rng([seed, epoch]).permutation(num_examples)

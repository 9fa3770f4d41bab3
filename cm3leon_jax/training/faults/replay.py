"""Detects silent errors of devices: computes some steps twice, on different devices, and compares.

A checked step is computed twice, the second time with every shard on another device. Fingerprints
of the inputs, gradients, updates and new states are compared. If they differ, the run ends, and its
restart continues from the newest checkpoint. In addition, the state that a checked step reads must
be bitwise equal to the state that the previous step wrote, and all replicas of a shard must be
equal.
"""

from collections.abc import Sequence
import dataclasses
import socket
from typing import NoReturn, TypeAlias

import jax
from jax.sharding import Mesh
import numpy as np

from cm3leon_jax import distributed
from cm3leon_jax.config.training import TrainConfig
from cm3leon_jax.errors import TryAgain, UserError
from cm3leon_jax.training.faults.assignment import moved, rolled
from cm3leon_jax.training.faults.fingerprint import (
  different_replicas,
  fingerprint_of,
  first_replicas,
  names_of,
)
from cm3leon_jax.training.step.state import TrainState
from cm3leon_jax.training.steps import PARTS, Steps, is_checked

Fingerprints: TypeAlias = dict[str, np.ndarray]
Computed: TypeAlias = tuple[TrainState, dict, Fingerprints]  # State, metrics and fingerprints.
Places = tuple[Sequence[int], Sequence[int]]  # Indices of arrays, places of devices in the mesh.
CONTINUE = "The same command continues from the newest checkpoint."
# What to do about a faulty device, see docs/monitoring.md.
AGAIN = (
  "If it happens again, report the device to its provider and run without its node (SLURM: "
  "--exclude=NODE; GKE: kubectl cordon NODE; a TPU slice: delete it and request another). If "
  "healthy GPUs round differently each time, set XLA_FLAGS=--xla_gpu_deterministic_ops=true, or "
  "train.replay_every=0."
)


class Replay:
  """Step function that checks some of the steps. `fault` describes the fault that was found."""

  def __init__(self, steps: Steps, config: TrainConfig, step: int, mesh: Mesh):
    """Creates the step function. All processes must call this."""
    self._usual, self._checked, self._config, self._step = steps.train, steps.checked, config, step
    self._base = steps.base
    self._meshes = (mesh, rolled(mesh))
    self._hosts = distributed.gather(socket.gethostname())
    # Fingerprint of the newest state; None unless the next step is checked.
    self._left: jax.Array | None = None
    self._sound = step  # Newest step whose state was restored or checked.
    self._first_replicas: np.ndarray | None = None
    self.fault = ""

  def __call__(
    self, state: TrainState, batch: dict, num_sources: int = 0
  ) -> tuple[TrainState, dict]:
    """Takes a step, see `state.train_step`.

    Raises:
      TryAgain: two computations of the step differ, the state has changed since the previous step,
        or replicas of a shard differ. The newest checkpoint is older than the error.
      UserError: the newest checkpoint may contain the error.
    """
    self._step += 1
    if is_checked(self._config, self._step):
      return self._check(state, batch, num_sources)
    state, metrics = self._usual(state, batch, num_sources=num_sources)
    self._left = fingerprint_of(state) if is_checked(self._config, self._step + 1) else None
    return state, metrics

  def _check(self, state: TrainState, batch: dict, num_sources: int) -> tuple[TrainState, dict]:
    """Computes a step twice and compares the computations."""
    # Computation 1 runs before computation 0, which donates the state. So at most two states are in
    # memory.
    moved_state, moved_batch = moved((state, batch), self._meshes[0])
    again = self._compute(1, moved_state, moved_batch, num_sources)[2]
    before, self._left = jax.device_get(self._left), None
    new, metrics, prints = self._compute(0, state, batch, num_sources)
    if self._first_replicas is None:
      self._first_replicas = first_replicas(new, self._meshes[0])
    # All processes must make the same decision, even if only one of them sees a difference.
    differences = [_places(prints[part] != again[part]) for part in PARTS]
    replicas = different_replicas(prints["read"], self._first_replicas)
    findings = distributed.gather([_changed(before, prints["read"]), replicas, *differences])
    changed, apart, *differences = map(_first, zip(*findings))
    self._raise_changed(changed, names_of(new))
    self._raise_apart(apart, names_of(new))
    for part, result in zip(PARTS, differences):
      of_params = part in ("gradients", "updates")
      self._raise_differ(part, result, names_of(new.params if of_params else new))
    self._sound = self._step
    if is_checked(self._config, self._step + 1):
      self._left = prints["left"]
    return new, metrics

  def _compute(self, number: int, state: TrainState, batch: dict, num_sources: int) -> Computed:
    """Computes a checked step, which donates `state`, and waits for its fingerprints."""
    more = {} if self._base is None else {"base": self._base}
    if number:
      more = moved(more, self._meshes[0])
    with jax.set_mesh(self._meshes[number]):
      state, metrics, prints = self._checked(state, batch, num_sources=num_sources, **more)
      return state, metrics, jax.device_get(prints)

  def _raise_differ(self, part: str, found: Places, names: list[str]) -> None:
    """Raises an error if two computations of a step differ in one of `PARTS`."""
    arrays, places = found
    if arrays:
      devices = [self._described(mesh, places) for mesh in self._meshes]
      where = f"the error was made on {_listed(list(dict.fromkeys(devices[0] + devices[1])))}"
      if len(places) > 1:
        where = "which device made the error is unknown, because it had spread to several shards"
      self.fault = (
        f"step {self._step}: two computations differ in {PARTS[part]} "
        f"({_listed([names[i] for i in arrays])}); {where}"
      )
      raise TryAgain(f"{self.fault}. {CONTINUE} {AGAIN}")

  def _raise_changed(self, found: Places, names: list[str]) -> None:
    """Raises an error if arrays have changed on devices between two steps."""
    arrays, places = found
    if arrays:
      before = self._step - 1
      self.fault = (
        f"the state that step {before} wrote is not the state that step {self._step} reads: "
        f"{_listed([names[i] for i in arrays])} has changed on {_listed(self._at(places))}"
      )
      self._stop(before)

  def _raise_apart(self, found: Places, names: list[str]) -> None:
    """Raises an error if replicas of arrays differ; `found` comes from `different_replicas`."""
    arrays, places = found
    if arrays:
      devices, which = _listed(self._at(places)), "has a replica that differs from all others"
      if len(places) > 1:
        which = "have different replicas, and it is unknown which of them is wrong"
      self.fault = (
        f"step {self._step} reads replicas that are not equal but were equal at step "
        f"{self._sound}: {_listed([names[i] for i in arrays])}; {devices} {which}"
      )
      self._stop(self._sound + 1)

  def _stop(self, since: int) -> NoReturn:
    """Raises an error about a damaged state. `since` is the first step that may be damaged."""
    newest = self._step - 1 - (self._step - 1) % self._config.checkpoint_every
    if newest < since:
      raise TryAgain(f"{self.fault}. {CONTINUE} {AGAIN}")
    raise UserError(
      f"{self.fault}. Checkpoint {newest} may contain the error: go back to a checkpoint "
      f"before step {since} (`cm3leon checkpoints rollback --workdir=WORKDIR --step=STEP`), then "
      f"run the same command again. {AGAIN}"
    )

  def _at(self, places: Sequence[int]) -> list[str]:
    """Returns a description of each device at `places` of the usual mesh."""
    return self._described(self._meshes[0], places)

  def _described(self, mesh: Mesh, places: Sequence[int]) -> list[str]:
    """Returns a description of each device at `places` of a mesh, with its process and host."""
    devices = [mesh.devices.flat[place] for place in places]
    return [
      f"device {d.id} ({d.device_kind}) of process {d.process_index} on "
      f"{self._hosts[d.process_index]}"
      for d in devices
    ]


def replaying(steps: Steps, config: TrainConfig, state: TrainState) -> Steps:
  """Returns `steps` with a training step that is checked every `config.replay_every` steps."""
  if not config.replay_every:
    return steps
  # Compile now. During a later compilation the devices would compute steps, and the time of these
  # steps would count as compiling.
  jax.block_until_ready(fingerprint_of(state))
  mesh = jax.sharding.get_mesh()
  replay = Replay(steps, config, int(state.step), mesh)
  where = "other devices (train.replay_every)"
  if mesh.size == 1:
    where = "the only device (train.replay_every): errors that it repeats stay undetected"
  distributed.print_once(f"train: one step in {config.replay_every:,} is checked on {where}.")
  return dataclasses.replace(steps, train=replay)


def _places(differ: np.ndarray) -> Places:
  return np.flatnonzero(differ.any(0)).tolist(), np.flatnonzero(differ.any(1)).tolist()


def _changed(before: np.ndarray | None, now: np.ndarray) -> Places:
  """Returns the indices of the arrays that have changed, and the places of the devices."""
  if before is None:
    return [], []
  return _places(before != now)


def _first(findings: Sequence[Places]) -> Places:
  """Returns the first finding that lists an array, or an empty finding if there is none."""
  return next((result for result in findings if result[0]), findings[0])


def _listed(names: Sequence[str]) -> str:
  """Formats names, e.g. "a, b, c and 4 others", or "none" for an empty list."""
  more = len(names) - 3
  others = f" and {more} other{'s' if more > 1 else ''}" if more > 0 else ""
  return f"{', '.join(names[:3])}{others}" or "none"

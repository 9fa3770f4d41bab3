"""Detects silent errors of devices: computes some steps twice, on different devices, and compares.

A checked step is computed twice, the second time with every shard on another device. Fingerprints
of the inputs, gradients, updates and new states are compared. If they differ, the step is computed
a third time on other devices, and the majority decides. In addition, the state that a checked step
reads must be bitwise equal to the state that the previous step wrote, and all replicas of a shard
must be equal.
"""

from collections.abc import Sequence
import dataclasses
import socket
from typing import Any, NoReturn, TypeAlias

import jax
from jax.sharding import Mesh
import numpy as np

from cm3leon_jax import distributed
from cm3leon_jax.config import TryAgain, UserError
from cm3leon_jax.training.config import TrainConfig
from cm3leon_jax.training.faults.assignment import assignments, moved, moved_back
from cm3leon_jax.training.faults.fingerprint import (
  Fingerprint,
  different_replicas,
  equal,
  fingerprint_of,
  first_replicas,
  names_of,
)
from cm3leon_jax.training.step.state import TrainState
from cm3leon_jax.training.steps import PARTS, Steps, is_checked

MOST = 2  # A run ends after this many faults in one start. Healthy devices cause none.
Fingerprints: TypeAlias = dict[str, Fingerprint]
Inputs: TypeAlias = tuple[TrainState, dict]  # State and batch.
Computed: TypeAlias = tuple[TrainState, dict, Fingerprints]  # State, metrics and fingerprints.
Places = tuple[Sequence[int], Sequence[int]]  # Indices of arrays, places of devices in the mesh.
CONTINUE = "The same command continues from the newest checkpoint."
# What to do about a faulty device, see docs/reliability.md.
REPLACE = (
  "report the device to its provider and run without its node (SLURM: --exclude=NODE; GKE: kubectl "
  "cordon NODE; a TPU slice: delete it and request another)"
)


@dataclasses.dataclass(frozen=True)
class Verdict:
  """Result of comparing three computations of a step.

  Attributes:
    wrong: indices of the outvoted computations. A computation is outvoted if, for at least one
      array on one device, it differs from the other two, which agree.
    undecided: whether there is an array for which no two computations agree.
    unconfirmed: whether the two computations that agree ran on the same assignment of several
      devices. If a device repeats an error, both contain it.
    part: the first of `PARTS` in which the computations differ.
    arrays: indices of the arrays that differ in this part.
    devices: ids of the devices on which a computation was outvoted in this part.
  """

  wrong: tuple[int, ...]
  undecided: bool
  unconfirmed: bool
  part: str
  arrays: tuple[int, ...]
  devices: tuple[int, ...]

  @property
  def majority(self) -> int | None:
    """Index of a computation whose state two computations agree on; None if there is none."""
    if self.undecided or self.unconfirmed or len(self.wrong) != 1:
      return None
    return 2 if self.wrong == (0,) else 0


def compare(
  computations: Sequence[Fingerprints], meshes: Sequence[Mesh], tolerance: float = 0.0
) -> Verdict:
  """Compares three computations of a step, shard by shard, and returns which of them is wrong.

    digests of an array on 3 devices, which are rolled by 0, 1 and 2 places:
      [7 8 9], [7 8 9], [7 5 9]: the third computation is wrong in shard 1, which it computed on
      device (1 + 2) mod 3 = 0
    on 2 devices, which are rolled by 0, 1 and 0 places:
      [5 8], [7 4], [5 8]: unconfirmed. Device 0 is always wrong here; [7 8] would be correct.

  `computations` contains the fingerprints of each computation by part, as numpy arrays. For
  `tolerance`, see `fingerprint.equal`.
  """
  wrong: set[int] = set()
  undecided, repeats = False, meshes[0] == meshes[2] and meshes[0].size > 1
  first: tuple[str, tuple[int, ...], tuple[int, ...]] | None = None
  for part in PARTS:
    a, b, c = computations
    ab, ac, bc = (_agree(part, *pair, tolerance) for pair in ((a, b), (a, c), (b, c)))
    outvoted = (bc & ~(ab & ac), ac & ~(ab & bc), ab & ~(ac & bc))
    wrong |= {i for i, places in enumerate(outvoted) if places.any()}
    undecided |= bool((~ab & ~ac & ~bc).any())
    differ = ~(ab & ac & bc)
    if first is None and differ.any():
      devices: dict[int, None] = {}
      for number, mesh in enumerate(meshes):
        places = outvoted[number] & (not (repeats and number == 1))
        devices |= dict.fromkeys(mesh.devices.flat[i].id for i in np.flatnonzero(places.any(1)))
      first = part, tuple(np.flatnonzero(differ.any(0)).tolist()), tuple(devices)
  unconfirmed = repeats and wrong == {1} and not undecided
  return Verdict(tuple(sorted(wrong)), undecided, unconfirmed, *(first or ("left", (), ())))


class Replay:
  """Step function that checks some of the steps. `faults` describes the faults found so far."""

  def __init__(self, steps: Steps, config: TrainConfig, step: int, mesh: Mesh):
    """Creates the step function. All processes must call this."""
    self._usual, self._checked, self._config, self._step = steps.train, steps.checked, config, step
    self._base = steps.base
    self._assignments = assignments(mesh)
    self._meshes = (mesh, *(a.mesh(mesh) for a in self._assignments))
    self._hosts = distributed.gather(socket.gethostname())
    # Fingerprint of the newest state; None unless the next step is checked.
    self._left: Fingerprint | None = None
    self._sound = step  # Newest step whose state was restored or checked.
    self._first_replicas: np.ndarray | None = None
    self.faults: list[str] = []

  def __call__(
    self, state: TrainState, batch: dict, num_sources: int = 0
  ) -> tuple[TrainState, dict]:
    """Takes a step, see `state.train_step`. A checked step adds the metric replay_faults.

    Raises:
      TryAgain: the state has changed since the previous step, or replicas of a shard differ. The
        newest checkpoint is older than the error.
      UserError: the newest checkpoint may contain the error, no two of three computations agree, or
        this start has found `MOST` faults.
    """
    self._step += 1
    if is_checked(self._config, self._step):
      return self._check(state, batch, num_sources)
    state, metrics = self._usual(state, batch, num_sources=num_sources)
    self._left = fingerprint_of(state) if is_checked(self._config, self._step + 1) else None
    return state, metrics

  def _check(self, state: TrainState, batch: dict, num_sources: int) -> tuple[TrainState, dict]:
    """Computes a step twice, and a third time if the two computations differ."""
    # Computation 1 runs before computation 0, which donates the state. In between, the state is
    # copied for computation 2. So at most two states are in memory.
    again = self._compute(1, *self._move(1, state, batch), num_sources)[2]
    spare = self._move(2, state, batch)
    before, self._left = jax.device_get(self._left), None
    new, metrics, prints = self._compute(0, state, batch, num_sources)
    tolerance = self._config.replay_tolerance
    same = all(_agree(part, prints, again, tolerance).all() for part in PARTS)
    if self._first_replicas is None:
      self._first_replicas = first_replicas(new, self._meshes[0])
    apart = different_replicas(prints["read"], self._first_replicas, tolerance)
    # All processes must make the same decision, even if only one of them sees a difference.
    findings = distributed.gather([_changed(before, prints["read"]), apart, not same])
    self._raise_changed(_first([changed for changed, _, _ in findings]), names_of(new))
    self._raise_apart(_first([apart for _, apart, _ in findings]), names_of(new))
    if any(differ for _, _, differ in findings):
      new, metrics, prints = self._decide((new, metrics, prints), again, spare, num_sources)
    self._sound = self._step
    if is_checked(self._config, self._step + 1):
      self._left = prints["left"]
    return new, {**metrics, "replay_faults": len(self.faults)}

  def _move(self, number: int, state: TrainState, batch: dict) -> Inputs:
    """Copies the inputs of a step to the devices of computation `number`."""
    place = self._assignments[number - 1]
    return moved((state, batch), self._meshes[0], self._meshes[number], place)

  def _compute(self, number: int, state: TrainState, batch: dict, num_sources: int) -> Computed:
    """Computes a checked step, which donates `state`, and waits for its fingerprints."""
    more = {} if self._base is None else {"base": self._base}
    if number:
      place = self._assignments[number - 1]
      more = moved(more, self._meshes[0], self._meshes[number], place)
    with jax.set_mesh(self._meshes[number]):
      state, metrics, prints = self._checked(state, batch, num_sources=num_sources, **more)
      return state, metrics, jax.device_get(prints)

  def _decide(
    self, first: Computed, again: Fingerprints, spare: Inputs, num_sources: int
  ) -> Computed:
    """Computes the step a third time and returns a result that two computations agree on.

    `spare` contains the inputs of the third computation.
    """
    third = self._compute(2, *spare, num_sources)
    prints = (first[2], again, third[2])
    verdict = _agreed(compare(prints, self._meshes, self._config.replay_tolerance))
    of_params = verdict.part in ("gradients", "updates")
    names = names_of(first[0].params if of_params else first[0])
    self._report(verdict, names)
    if verdict.majority == 0:
      return first
    for x in jax.tree.leaves(first[0]):
      x.delete()  # Free memory for the copy of the correct state.
    state = moved_back(third[0], self._meshes[2], self._meshes[0], self._assignments[1])
    return state, *third[1:]

  def _report(self, verdict: Verdict, names: list[str]) -> None:
    """Prints the fault that was found. Raises UserError if the run must stop."""
    what = f"{PARTS[verdict.part]} ({_listed([names[i] for i in verdict.arrays])})"
    where = "which device made the error is unknown, because it had spread to several shards"
    if len(verdict.devices) == 1:
      where = f"the error was made on {self._described(verdict.devices)[0]}"
    elif not verdict.devices:
      where = "which device made the error is unknown"
    if verdict.majority is None:
      agree = f"no two of three computations agree about {what}, and {where}"
      if verdict.unconfirmed:
        agree = (
          f"two of three computations agree about {what}, but they ran on the same assignment of "
          f"the devices, where an error may repeat, and {where}"
        )
      self.faults.append(f"step {self._step}: {agree}")
      raise UserError(
        f"{self.faults[-1]}. Either these devices do not round in the same way: set "
        "train.replay_tolerance=1e-2, or train.replay_every=0. Or a device is broken: "
        f"{REPLACE}. {CONTINUE}"
      )
    self.faults.append(
      f"step {self._step}: one of three computations was wrong, in {what}; {where}"
    )
    if len(self.faults) >= MOST:
      raise UserError(
        f"{'; '.join(self.faults)}. Healthy devices make no such errors: {REPLACE}. {CONTINUE}"
      )
    distributed.print_once(
      f"train: warning: {self.faults[-1]}. The run continues with the result of the two others; it "
      "stops at the next fault."
    )

  def _raise_changed(self, found: Places, names: list[str]) -> None:
    """Raises an error if arrays have changed on devices between two steps."""
    arrays, places = found
    if arrays:
      before = self._step - 1
      self.faults.append(
        f"the state that step {before} wrote is not the state that step {self._step} reads: "
        f"{_listed([names[i] for i in arrays])} has changed on {_listed(self._at(places))}"
      )
      self._stop(before, f"If it happens again, {REPLACE}.")

  def _raise_apart(self, found: Places, names: list[str]) -> None:
    """Raises an error if replicas of arrays differ; `found` comes from `different_replicas`."""
    arrays, places = found
    if arrays:
      devices, which = _listed(self._at(places)), "has a replica that differs from all others"
      if len(places) > 1:
        which = "have different replicas, and it is unknown which of them is wrong"
      self.faults.append(
        f"step {self._step} reads replicas that are not equal but were equal at step "
        f"{self._sound}: {_listed([names[i] for i in arrays])}; {devices} {which}"
      )
      again = f"If it happens again, {REPLACE}."
      if not self._config.replay_tolerance:
        again += " If healthy devices round differently here, set train.replay_tolerance=1e-2."
      self._stop(self._sound + 1, again)

  def _stop(self, since: int, again: str) -> NoReturn:
    """Raises an error about a damaged state. `since` is the first step that may be damaged."""
    newest = self._step - 1 - (self._step - 1) % self._config.checkpoint_every
    if newest < since:
      raise TryAgain(f"{self.faults[-1]}. {CONTINUE} {again}")
    raise UserError(
      f"{self.faults[-1]}. Checkpoint {newest} may contain the error: go back to a checkpoint "
      f"before step {since} (`cm3leon checkpoints rollback --workdir=WORKDIR --step=STEP`), then "
      f"run the same command again. {again}"
    )

  def _at(self, places: Sequence[int]) -> list[str]:
    """Returns a description of each device at `places` of the mesh."""
    return self._described([self._meshes[0].devices.flat[i].id for i in places])

  def _described(self, ids: Sequence[int]) -> list[str]:
    """Returns a description of each device, with its process and host."""
    devices = {d.id: d for d in self._meshes[0].devices.flat}
    return [
      f"device {i} ({devices[i].device_kind}) of process {devices[i].process_index} on "
      f"{self._hosts[devices[i].process_index]}"
      for i in ids
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


def _agreed(verdict: Verdict) -> Verdict:
  """Returns the verdict of the first process that found a difference. All processes must call this.

  Each process reads its own replica of the fingerprints, and one replica may be damaged.
  """
  found = distributed.gather(dataclasses.asdict(verdict))
  fields = next((f for f in found if f["wrong"] or f["undecided"]), found[0])
  values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
  return Verdict(**values)


def _agree(part: str, a: Fingerprints, b: Fingerprints, tolerance: float) -> np.ndarray:
  """Returns, for each device and array, whether two computations agree about a part."""
  return equal(a[part], b[part], 0.0 if part == "read" else tolerance)


def _changed(before: Fingerprint | None, now: Fingerprint) -> Places:
  """Returns the indices of the arrays that have changed, and the places of the devices."""
  if before is None:
    return [], []
  changed = before.digest != now.digest
  return np.flatnonzero(changed.any(0)).tolist(), np.flatnonzero(changed.any(1)).tolist()


def _first(findings: Sequence[Places]) -> Places:
  """Returns the first finding that lists an array, or an empty finding if there is none."""
  return next((found for found in findings if found[0]), findings[0])


def _listed(names: Sequence[str]) -> str:
  """Formats names, e.g. "a, b, c and 4 others", or "none" for an empty list."""
  more = len(names) - 3
  others = f" and {more} other{'s' if more > 1 else ''}" if more > 0 else ""
  return f"{', '.join(names[:3])}{others}" or "none"

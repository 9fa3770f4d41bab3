"""Decides whether a run begins, continues or is finished, and records its config."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from typing import TYPE_CHECKING

from cm3leon_jax.config import UserError
from cm3leon_jax.files.atomic import exists
from cm3leon_jax.files.json_files import plain, read_json, write_json
from cm3leon_jax.runs import stages

if TYPE_CHECKING:
  from collections.abc import Sequence

  from etils import epath

  from cm3leon_jax.settings import Settings
  from cm3leon_jax.trained.initial import Weights


def begin(
  settings: Settings,
  workdir: epath.Path,
  init_from: str,
  more: dict | None = None,
  allowed: Sequence[str] = (),
) -> tuple[dict, Weights | None]:
  """Checks that the run in `workdir` is this one, if there is one. All processes must call it.

  Args:
    settings: settings of the config.
    workdir: folder of the run.
    init_from: what it starts from; "": random parameters, or what it began from.
    more: what the run depends on beside `stages.run_config`.
    allowed: fields that may differ from those of the run, see `changes.check_changes`.

  Returns:
    What the run depends on, and the parameters that it starts from; None: random ones.

  Raises:
    UserError: the folder holds another run, or a new run asks for a board that is not installed.
  """
  from cm3leon_jax import distributed
  from cm3leon_jax.trained import initial
  from cm3leon_jax.training.changes import check_changes
  from cm3leon_jax.training.watch import boards

  path = workdir / "train" / "config.json"
  with distributed.together():  # No process writes before all have read.
    stored = read_json(path, {"run": dict})["run"] if exists(path) else None
    if stored is None:  # A run that has begun goes on without a board.
      check_no_checkpoints(path)
      boards.check_installed(settings.train)
    config = stages.run_config(settings, workdir, "train") | (more or {})
  start = initial.start_of_run(settings, workdir, init_from, stored)
  if start is not None:
    config["init_from"] = dataclasses.asdict(start)
  elif settings.instructions.any and stored is None:
    distributed.print_once(
      "train: warning: config.instructions has tasks, and the run starts from random parameters: "
      "--init_from=RUN tunes a trained model."
    )
  with distributed.together():
    changed = []
    if stored is not None:
      changed = check_changes(path.parent, stored, config, allowed)
  for change in changed:
    distributed.print_once(f"train: continues with {change}.")
  return config, start


def check_no_checkpoints(path: epath.Path) -> None:
  """Checks that a folder without its file `path`, the config, has no checkpoints.

  Raises:
    UserError: it has, so nobody knows which run they are of.
  """
  from cm3leon_jax.checkpoints import reading

  if reading.any_in(path.parent):
    raise UserError(
      f"{path} is missing, and {path.parent} holds checkpoints: it says with which seed, data and "
      f"optimizer they were trained. Restore it from a copy, or delete {path.parent} to start "
      "again."
    )


def write_config(
  settings: Settings, workdir: epath.Path, config: dict, step: int | None = None
) -> None:
  """Writes what a run depends on, once its rows are known to be sound. All processes must call it.

  Args:
    settings: settings of the config.
    workdir: folder of the run.
    config: of `begin`.
    step: of the checkpoint from which it continues; default: the newest.

  Raises:
    UserError: a process sees another folder.
  """
  from cm3leon_jax import distributed
  from cm3leon_jax.checkpoints.reading import newest_step

  path = workdir / "train" / "config.json"
  with distributed.together():
    if distributed.is_first():
      content = {"run": config, "settings": dataclasses.asdict(settings)}
      before = read_json(path) if exists(path) else {"run": config}
      changes = before.get("changes", [])
      if changed := stages.differences(before["run"], plain(config)):
        changes = [*changes, {"step": step or newest_step(path.parent), "fields": changed}]
      write_json(path, {**content, **({"changes": changes} if changes else {})})
  with distributed.together():
    if not path.exists():
      raise UserError(
        f"--workdir {workdir} is another folder for some of the processes: "
        "name a folder that all processes share."
      )


def goes_on(folder: epath.Path, config: dict, steps: int, changes: bool = False) -> bool:
  """Returns whether a finished run is to go on, because it has fewer steps than it shall have.

  Args:
    folder: of the run.
    config: what the run depends on now.
    steps: that it shall have.
    changes: whether fields of a finished run may differ, as `begin` has checked.

  Raises:
    UserError: fields differ, and no step is left.
  """
  done = folder / stages.DONE
  if not exists(done):
    return False
  stored = read_json(done, {"config": dict, "summary": dict})
  trained = stored["summary"].get("steps", 0)
  redo = trained < steps
  changed = stages.differences(stored["config"], plain(config)) if changes else []
  if changed and not redo:
    raise UserError(
      f"{folder} is finished at step {trained}, so nothing would be trained "
      f"with {'; '.join(changed)}: raise config.train.steps, which is {steps}."
    )
  return redo


def stage(
  folder: epath.Path, config: dict, redo: bool
) -> contextlib.AbstractContextManager[dict | None]:
  """Runs the body once, together with the other processes of a job; see `stages.once`."""
  from cm3leon_jax import distributed

  return stages.once(
    folder, config, redo, writes=distributed.is_first(), together=distributed.together
  )


def print_more(folder: epath.Path, command: str = "train") -> None:
  """Prints how a finished run of a command gets more steps."""
  from cm3leon_jax import distributed

  steps = read_json(folder / stages.DONE, {"summary": dict})["summary"].get("steps", 0)
  distributed.print_once(
    f"{command}: the run has its {steps} steps; --config.train.steps={2 * steps or 'N'}, with the "
    "same flags, would continue it."
  )


def machine() -> str:
  """Describes what trains: "2 CPU cores", which this process may use, or "8 x TPU v5"."""
  import jax

  if jax.default_backend() != "cpu":
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"
  has_affinity = hasattr(os, "sched_getaffinity")
  cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
  return f"{cores} CPU core{'s' * (cores > 1)}"

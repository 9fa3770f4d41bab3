"""Decides for train and reinforce whether a run begins, continues or is finished."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import os

from etils import epath, epy

from cm3leon_jax.config.settings import Settings
from cm3leon_jax.errors import UserError
from cm3leon_jax.files.atomic import exists
from cm3leon_jax.files.json_files import plain, read_json, write_json
from cm3leon_jax.stages import stages

with epy.lazy_imports():
  import jax

  from cm3leon_jax import distributed
  from cm3leon_jax.run import adapters, base_documents, initial
  from cm3leon_jax.run import changes as changes_lib
  from cm3leon_jax.weights import reading


def begin(
  settings: Settings,
  workdir: epath.Path,
  init_from: str,
  more: dict | None = None,
  allowed: Sequence[str] = (),
) -> tuple[dict, adapters.ParamsRef | None]:
  """Checks that a run in `workdir`, if it exists, has this config.

  All processes must call this function.

  Args:
    init_from: source of the first parameters, see `initial.of_run`.
    more: values on which the run depends, in addition to `stages.run_config`.
    allowed: fields that may differ from the config of the run, see `changes.check_changes`.

  Returns:
    All values on which the run depends, and the parameters from which it starts, or None if they
    are random.

  Raises:
    UserError: the folder has another run.
  """
  path = workdir / "train" / "config.json"
  with distributed.together():  # All processes read before one process writes.
    stored = read_json(path, {"run": dict})["run"] if exists(path) else None
    if stored is None:
      check_no_checkpoints(path)
    base = base_documents.ids(settings, workdir)
    config = stages.run_config(settings, workdir, "train", base) | (more or {})
  start = initial.of_run(settings, workdir, init_from, stored)
  if start is not None:
    config["init_from"] = dataclasses.asdict(start)
  elif settings.instructions.any and stored is None:
    distributed.print_once(
      "train: warning: config.instructions has tasks, but the run starts from random parameters: "
      "--init_from=RUN tunes a trained model."
    )
  with distributed.together():
    changed = (
      changes_lib.check_changes(path.parent, stored, config, allowed) if stored is not None else []
    )
  for change in changed:
    distributed.print_once(f"train: continues with {change}.")
  return config, start


def check_no_checkpoints(path: epath.Path) -> None:
  """Raises UserError if `path`, a run's config file, is missing but its folder has checkpoints."""
  if reading.any_in(path.parent):
    raise UserError(
      f"{path} is missing, but {path.parent} has checkpoints: the file records the seed, data and "
      f"optimizer that they were trained with. Restore it from a copy, or delete {path.parent} to "
      "start again."
    )


def write_config(settings: Settings, workdir: epath.Path, config: dict) -> None:
  """Writes train/config.json. Call it after the rows have been opened and checked.

  All processes must call this function. `config` is the dict that `begin` returned.

  Raises:
    UserError: the workdir is not the same folder for all processes.
  """
  path = workdir / "train" / "config.json"
  with distributed.together():
    if distributed.is_first():
      content = {"run": config, "settings": dataclasses.asdict(settings)}
      before = read_json(path) if exists(path) else {"run": config}
      changes = before.get("changes", [])
      if changed := stages.differences(before["run"], plain(config)):
        changes = [*changes, {"step": stages.newest_step(path.parent), "fields": changed}]
      write_json(path, {**content, **({"changes": changes} if changes else {})})
  with distributed.together():
    if not path.exists():
      raise UserError(
        f"--workdir {workdir} is another folder for some of the processes: "
        "name a folder that all processes share."
      )


def resumes(folder: epath.Path, config: dict, steps: int, allowed: Sequence[str]) -> bool:
  """Returns whether a finished run must continue, because it has fewer than `steps` steps.

  A run that `train.max_forgetting` or `train.patience` ended does not continue.

  `folder` is train/ in the workdir, and `config` is the dict that `begin` returned. `allowed` names
  the fields that may differ from the config of the run; `begin` has checked them.

  Raises:
    UserError: config fields differ, but no step is left to train.
  """
  done = folder / stages.DONE
  if not exists(done):
    return False
  stored = read_json(done, {"config": dict, "summary": dict})
  trained = stored["summary"].get("steps", 0)
  redo = trained < steps and not {"forgetting", "overfitting"} & stored["summary"].keys()
  changed = stages.differences(stored["config"], plain(config)) if allowed else []
  if changed and not redo:
    raise UserError(
      f"{folder} is finished at step {trained}, so nothing would be trained "
      f"with {'; '.join(changed)}: raise config.train.steps, which is {steps}."
    )
  return redo


def print_more(folder: epath.Path, command: str = "train") -> None:
  """Prints how to continue a finished run with more steps."""
  summary = read_json(folder / stages.DONE, {"summary": dict})["summary"]
  steps = summary.get("steps", 0)
  if ended := {"forgetting", "overfitting"} & summary.keys():
    field = "max_forgetting" if "forgetting" in ended else "patience"
    distributed.print_once(
      f"{command}: warning: config.train.{field} ended the run at step {steps}, and it does not "
      "continue."
    )
    return
  distributed.print_once(
    f"{command}: the run has its {steps} steps; --config.train.steps={2 * steps or 'N'}, with the "
    "same flags, would continue it."
  )


def machine() -> str:
  """Describes the hardware: "8 x TPU v5", or "2 CPU cores" that this process may use."""
  if jax.default_backend() != "cpu":
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"
  has_affinity = hasattr(os, "sched_getaffinity")
  cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
  return f"{cores} CPU core{'s' * (cores > 1)}"

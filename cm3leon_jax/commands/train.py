"""Trains the decoder; the same command continues a run that was stopped or killed.

  python -m launch.train --config=ml_configs/scenes.py --workdir=workdir/scenes
  python -m launch.train --config=ml_configs/scenes.py --workdir=new --init_from=workdir/scenes

--init_from starts a new run from trained parameters of the same model and vocab, at step 0. The run
remembers where it started, and continues without the flag. A run is continued by the config that it
began with; --allow_changed names fields of the optimizer, or train.global_batch_size, that may
differ from now on. At SIGTERM and Ctrl-C the run saves and stops.

--resume_from=500 --skip_rows=4000:4799 goes back to checkpoint 500 and on without these rows, e.g.
those of skipped steps. The run remembers them, so both flags may be given again or left out.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from typing import TYPE_CHECKING

from absl import flags

from cm3leon_jax import stages
from cm3leon_jax.commands import common, training_rows
from cm3leon_jax.commands.init_from_flag import INIT_FROM
from cm3leon_jax.config import UserError
from cm3leon_jax.io import plain, read_json, write_json

if TYPE_CHECKING:
  from collections.abc import Sequence

  from cm3leon_jax.export.weights import Weights
  from cm3leon_jax.settings import Settings
  from cm3leon_jax.training.skipped_rows import GoBack

_PROFILE_STEPS = flags.DEFINE_string(
  "profile_steps", "", "First and last step to trace into train/profile, e.g. 10:13."
)
_RESUME_FROM = flags.DEFINE_integer(
  "resume_from",
  None,
  "Checkpoint to go back to, with --skip_rows; later ones are deleted.",
  lower_bound=1,
)
_SKIP_ROWS = flags.DEFINE_string(
  "skip_rows", "", "First and last row to leave out from there on, e.g. 4000:4799."
)
_DEBUG_NANS = flags.DEFINE_bool(
  "debug_nans", False, "Stop at the operation that computes the first NaN. Slow."
)
_ALLOW_CHANGED = flags.DEFINE_list(
  "allow_changed",
  [],
  "Fields that may differ from those that the run began with, e.g. optimizer.learning_rate. What "
  "follows is printed, and train/config.json lists the changes.",
)

_SKIP_MEMORY_CHECK = flags.DEFINE_bool(
  "skip_memory_check", False, "Start even if a step seems to need more memory than a device has."
)


def begin(
  settings: Settings,
  workdir,
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
    UserError: the folder holds another run.
  """
  from cm3leon_jax import distributed
  from cm3leon_jax.export import weights
  from cm3leon_jax.training.changes import check_changes

  path = workdir / "train" / "config.json"
  with distributed.together():  # No process writes before all have read.
    config = stages.run_config(settings, workdir, "train") | (more or {})
    stored = read_json(path, {"run": dict})["run"] if path.exists() else None
  start = weights.start_of_run(settings, workdir, init_from, stored)
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


def write_config(settings: Settings, workdir, config: dict) -> None:
  """Writes what a run depends on, once its rows are known to be sound. All processes must call it.

  Raises:
    UserError: a process sees another folder.
  """
  from cm3leon_jax import distributed
  from cm3leon_jax.training.checkpoint import newest_step

  path = workdir / "train" / "config.json"
  with distributed.together():
    if distributed.is_first():
      content = {"run": config, "settings": dataclasses.asdict(settings)}
      before = read_json(path) if path.exists() else {"run": config}
      changes = before.get("changes", [])
      if changed := stages.differences(before["run"], plain(config)):
        changes = [*changes, {"step": newest_step(path.parent), "fields": changed}]
      write_json(path, {**content, **({"changes": changes} if changes else {})})
  with distributed.together():
    if not path.exists():
      raise UserError(
        f"--workdir {workdir} is another folder for some of the processes: "
        "name a folder that all processes share."
      )


def goes_on(folder, config: dict, steps: int, changes: bool = False) -> bool:
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
  if not done.exists():
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


def _initial_params(settings: Settings, workdir, start: Weights | None):
  """Returns a function that makes the parameters of a new run, or None for random ones."""
  import jax

  from cm3leon_jax.export import weights
  from cm3leon_jax.models.start import params_from_codebook
  from cm3leon_jax.tokenizers import vqgan

  if start is not None:
    return functools.partial(weights.load, start, settings)
  if not settings.model.codebook_start:
    return None
  table = vqgan.ImageTokenizer.load(workdir / "vqgan").params["codebook"]["table"]
  codebook = jax.device_get(vqgan.l2_normalize(table))
  key = jax.random.key(settings.seed)
  return functools.partial(
    params_from_codebook, settings.model, settings.vocab.text_size, codebook, key
  )


def _left_out(
  settings: Settings, folder, back: GoBack | None
) -> tuple[tuple[range, ...], GoBack | None]:
  """Returns the rows that the run leaves out, and `back`, or None if it was done already.

  Raises:
    UserError: `back` is impossible.
  """
  from cm3leon_jax import distributed
  from cm3leon_jax.training import skipped_rows

  with distributed.together():
    done = skipped_rows.read(folder)
    if back in done:
      back = None  # A job that was started again with the same flags.
    if back is not None:
      skipped_rows.check(back, done, settings.train.global_batch_size, folder)
      done.append(back)
  return tuple(earlier.rows for earlier in done), back


def machine() -> str:
  """Describes what trains: "2 CPU cores", which this process may use, or "8 x TPU v5"."""
  import jax

  if jax.default_backend() != "cpu":
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"
  has_affinity = hasattr(os, "sched_getaffinity")
  cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
  return f"{cores} CPU core{'s' * (cores > 1)}"


def main(
  settings: Settings,
  workdir,
  profile_steps: str = "",
  debug_nans: bool = False,
  init_from: str = "",
  allow_changed: Sequence[str] = (),
  back: GoBack | None = None,
  skip_memory_check: bool = False,
) -> None:
  import jax

  from cm3leon_jax import distributed
  from cm3leon_jax.generation.heldout import sample_grids
  from cm3leon_jax.planning import memory
  from cm3leon_jax.training.lease import Lease
  from cm3leon_jax.training.monitor import change_line
  from cm3leon_jax.training.objective import Rows
  from cm3leon_jax.training.profile import parse_steps
  from cm3leon_jax.training.train import train

  traced = parse_steps(profile_steps, settings.train.steps)
  flags_given = {"profile_steps": profile_steps, "debug_nans": debug_nans, "init_from": init_from}
  flags_given |= {"allow_changed": list(allow_changed), "go_back": str(back)}
  distributed.check_same_config({**dataclasses.asdict(settings), **flags_given})
  mesh = common.make_mesh(settings)  # An unfit mesh is found before a stage is read.
  if not skip_memory_check:
    memory.check_devices(settings, mesh)
  config, start = begin(settings, workdir, init_from, allowed=allow_changed)
  folder = workdir / "train"
  left_out, back = _left_out(settings, folder, back)
  redo = goes_on(folder, config, settings.train.steps, bool(allow_changed)) or back is not None
  # A context: jax.config.update loses the setting after tracing logsumexp and others (jax 0.10.2).
  nans = jax.debug_nans(debug_nans or jax.config.jax_debug_nans)
  stage = stages.once(
    folder, config, redo, writes=distributed.is_first(), together=distributed.together
  )
  # The lease first: the stage deletes and writes files of the folder.
  with common.use_mesh(settings), nans, Lease(folder) as lease, stage as summary:
    if summary is None:
      return
    common.keep_compiled(workdir)
    with distributed.together():
      writes = distributed.is_first()
      loader = training_rows.open_rows(settings, workdir, "train", write_starts=writes)
      heldout = training_rows.open_rows(settings, workdir, "heldout")
    write_config(settings, workdir, config)
    with distributed.together():
      summary.update(rows=training_rows.look_at_rows(loader.plan))
      generate_grid = None  # Its captions are those of held-out documents.
      if training_rows.replay_share(settings, "heldout"):
        generate_grid = sample_grids(settings, workdir, folder / "samples")
    sections = (settings.model, settings.optimizer, settings.train, settings.vocab)
    initial_params = _initial_params(settings, workdir, start)
    options = (settings.seed, generate_grid, traced, initial_params, start is not None, lease)
    rows = Rows(loader, left_out)
    result = train(folder, *sections, rows, heldout, *options, go_back=back)
    summary.update(result, machine=machine())
    units = {"image": "code", "text": "token"}
    losses = {name: result[f"heldout_{name}_loss"] for name in units}  # 0: no such targets.
    shown = [f"{name} {loss:.3f} nats per {units[name]}" for name, loss in losses.items() if loss]
    distributed.print_once(f"train: {result['steps']} steps, held-out loss: {', '.join(shown)}.")
    if before := result.get("heldout_before"):
      distributed.print_once(change_line(before, {name: result[name] for name in before}))


def _main(settings, workdir) -> None:
  from cm3leon_jax.training.skipped_rows import parse

  back = parse(_RESUME_FROM.value, _SKIP_ROWS.value)
  main(
    settings,
    workdir,
    _PROFILE_STEPS.value,
    _DEBUG_NANS.value,
    INIT_FROM.value,
    _ALLOW_CHANGED.value,
    back,
    _SKIP_MEMORY_CHECK.value,
  )


if __name__ == "__main__":
  common.run(_main, several_processes=True, saves=True)

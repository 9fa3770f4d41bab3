"""Trains the decoder; the same command continues a run that was stopped or killed.

  cm3leon train --config=examples/scenes/config.py --workdir=workdir/scenes
  cm3leon train --config=examples/scenes/config.py --workdir=new --init_from=workdir/scenes

--init_from starts a new run at step 0 from trained parameters of the same model and vocab. The run
stores this origin, so that it continues without the flag. A run must continue with the config that
it began with. --allow_changed names fields that may change: fields of the optimizer, or
train.global_batch_size. At SIGTERM and Ctrl-C the run saves and stops.

With --config.adapter.rank=16, the run trains only low-rank adapters of the parameters that
--init_from names, which must remain on disk (docs/tuning.md).
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools
import time
from typing import Annotated

from etils import epath, epy
from pydantic import Field

from cm3leon_jax.commands import common, shared_flags
from cm3leon_jax.config.model import AdapterConfig
from cm3leon_jax.config.settings import Settings
from cm3leon_jax.run import resume

with epy.lazy_imports():
  import jax

  from cm3leon_jax import distributed
  from cm3leon_jax.data.rows import skipped_rows
  from cm3leon_jax.generation import heldout as heldout_lib
  from cm3leon_jax.models import codebook_start
  from cm3leon_jax.planning import memory
  from cm3leon_jax.run import adapters as adapters_lib
  from cm3leon_jax.run import pace, rows
  from cm3leon_jax.run import run as run_lib
  from cm3leon_jax.training import decoder, objective
  from cm3leon_jax.training.faults import lease as lease_lib
  from cm3leon_jax.training.watch import monitor, traces

MEASURED_STEPS = 16


@dataclasses.dataclass(frozen=True)
class Flags(shared_flags.Training, shared_flags.Processes):
  profile_steps: str = ""
  """First and last step to trace into train/profile, e.g. 10:13."""
  debug_nans: bool = False
  """Stop at the operation that computes the first NaN. Slow."""
  measure_after: Annotated[float, Field(ge=0)] | None = None
  """Train nothing; measure a step, and write the steps that fit into config.train.minutes, of which
  this many seconds have passed, to pace.json. `cm3leon run` does this."""


def _initial_params(
  run: run_lib.Run, start: adapters_lib.ParamsRef | None
) -> Callable[[], dict] | None:
  """Returns a function that creates the first parameters of a run; None if they are random."""
  settings = run.settings
  if isinstance(settings.tuned, AdapterConfig):
    return None
  if settings.tuned is not None and start is not None:
    found = adapters_lib.Adapters(run.folder, settings.tuned, start)
    return functools.partial(run_lib.load_trained, found)
  if start is not None:
    return functools.partial(run_lib.load_initial, start, settings)
  if not settings.model.codebook_start:
    return None
  key = jax.random.key(settings.seed)
  return functools.partial(
    codebook_start.params_from_codebook,
    settings.model,
    settings.vocab.text_size,
    run.images.codebook(),
    key,
  )


def _frozen_params(
  run: run_lib.Run, start: adapters_lib.ParamsRef | None
) -> Callable[[], dict] | None:
  """Returns a function that loads the base of a run; None: the run trains all parameters."""
  if run.settings.tuned is None or start is None:
    return None
  found = adapters_lib.Adapters(run.folder, run.settings.tuned, start)
  return functools.partial(run_lib.load_frozen, found, run.settings.model.dtype)


def main(settings: Settings, workdir: epath.Path, flags: Flags) -> None:
  if flags.measure_after is not None:
    _measure(settings, workdir, flags.init_from, flags.measure_after)
    return
  run = run_lib.Run(workdir, settings)
  traced = traces.parse_steps(flags.profile_steps, settings.train.steps)
  names = ("profile_steps", "debug_nans", "init_from", "allow_changed")
  given = {name: getattr(flags, name) for name in names}
  distributed.check_same_config({**dataclasses.asdict(settings), **given})
  mesh = common.make_mesh(settings)  # Detects a wrong mesh before any stage is read.
  if not flags.skip_memory_check:
    memory.check_devices(settings, mesh)
  config, start = resume.begin(settings, workdir, flags.init_from, allowed=flags.allow_changed)
  folder = workdir / "train"
  redo = resume.resumes(folder, config, settings.train.steps, flags.allow_changed)
  # `jax.config.update` would lose the setting when logsumexp is traced (jax 0.10.2).
  nans = jax.debug_nans(flags.debug_nans or jax.config.jax_debug_nans)
  stage = distributed.once(folder, config, redo)
  # Take the lease first, because the stage deletes and writes files in the folder.
  with common.use_mesh(settings), nans, lease_lib.Lease(folder) as lease, stage as summary:
    if summary is None:
      resume.print_more(folder)
      return
    common.keep_compiled(workdir)
    with distributed.together():
      loader = run.rows("train", distributed.is_first())
      heldout = run.rows("heldout")
      left_out = tuple(skipped_rows.read(folder))
    resume.write_config(settings, workdir, config)
    with distributed.together():
      summary.update(rows=rows.look_at_rows(loader.plan))
      rows.print_phases(settings)
      generate_grid = None  # Without held-out documents, there are no captions for a grid.
      if rows.replay_share(settings, "heldout"):
        generate_grid = heldout_lib.sample_grids(run, folder / "samples")
    training = decoder.DecoderTraining.of(
      settings, folder=folder, objective=objective.RowObjective(loader, left_out), heldout=heldout,
      sample_grid=generate_grid, profile_steps=traced, initial_params=_initial_params(run, start),
      evaluate_start=start is not None, frozen_params=_frozen_params(run, start),
    )  # fmt: skip
    result = decoder.train(training, lease)
    summary.update(result, machine=resume.machine())
    _print_losses(result)


def _measure(settings: Settings, workdir: epath.Path, init_from: str, passed: float) -> None:
  """Takes some steps of a run, keeps nothing of them, and writes pace.json."""
  begun = time.monotonic()
  run = run_lib.Run(workdir, settings)
  _, start = resume.begin(settings, workdir, init_from)
  with common.use_mesh(settings):
    training = decoder.DecoderTraining.of(
      settings, folder=workdir / "train", objective=objective.RowObjective(run.rows("train")),
      heldout=run.rows("heldout"), frozen_params=_frozen_params(run, start),
    )  # fmt: skip
    seconds = decoder.step_seconds(training, MEASURED_STEPS)
  passed += time.monotonic() - begun
  pace.write(workdir, pace.Pace.of(settings.train.minutes, passed, seconds, pace.after(settings)))


def _print_losses(result: dict) -> None:
  """Prints the held-out losses of the last step and, if they are known, of step 0."""
  units = {"image": "code", "text": "token"}
  losses = {name: result[f"heldout_{name}_loss"] for name in units}  # 0 if there are no targets.
  shown = [f"{name} {loss:.3f} nats per {units[name]}" for name, loss in losses.items() if loss]
  distributed.print_once(f"train: {result['steps']} steps, held-out loss: {', '.join(shown)}.")
  if before := result.get("heldout_before"):
    distributed.print_once(monitor.change_line(before, result))
  if result.get("overfitting"):
    distributed.print_once(
      f"train: warning: the training ended at step {result['steps']}, because the held-out loss "
      "was above its lowest value for config.train.patience evaluations; step "
      f"{result['best']}, which had it, is the result."
    )
  if risen := result.get("forgetting"):
    distributed.print_once(
      f"train: warning: the training ended at step {result['steps']}, because the loss of the "
      f"base's documents rose by {risen:.1%}, more than config.train.max_forgetting."
    )


if __name__ == "__main__":
  common.run(main, Flags, saves=True)

"""Trains with rewards: draws images for prompts, scores them, and makes better images more likely.

  cm3leon reinforce --config=examples/scenes/reinforce.py \\
    --workdir=workdir/reinforced --init_from=workdir/scenes_instruct

First run cm3leon copy_tokenizers and cm3leon encode_instructions with the same flags. The prompts
are training records of the tasks of config.reinforce; the model never sees their target images. A
judge of the config, CLIP or a function of yours scores the images, and the method is GRPO
(https://arxiv.org/abs/2402.03300). The result is a run like a run of cm3leon train, and the same
command continues it. At the end the command prints the reward of held-out prompts, the diversity of
their samples and the held-out loss, for the first and the final parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import functools
import os

from etils import epath, epy

from cm3leon_jax.commands import common, malloc, shared_flags
from cm3leon_jax.config.settings import Settings
from cm3leon_jax.errors import UserError
from cm3leon_jax.run import resume

with epy.lazy_imports():
  import jax
  import numpy as np

  from cm3leon_jax import distributed
  from cm3leon_jax.evaluation import intervals
  from cm3leon_jax.files import digests
  from cm3leon_jax.planning import memory
  from cm3leon_jax.reinforcement import rollouts
  from cm3leon_jax.run import adapters, bundles
  from cm3leon_jax.run import run as run_lib
  from cm3leon_jax.run import source as source_lib
  from cm3leon_jax.training import decoder
  from cm3leon_jax.training.faults import lease as lease_lib
  from cm3leon_jax.training.watch import monitor


def _objective(
  run: run_lib.Run, start: adapters.ParamsRef, reference: dict
) -> tuple[rollouts.Rollouts, list]:
  """Returns the objective and the held-out prompts."""
  # The run can have its own bank; otherwise it uses that of its start.
  folders = (run.folder, bundles.stages_folder(source_lib.folder_of(start.source)))
  banks = (folder for folder in folders if (folder / "neighbors").exists())
  return rollouts.open_rollouts(run, reference, next(banks, None))


def _scores(
  run: run_lib.Run, objective: rollouts.Rollouts, reference: dict, prompts: list
) -> dict[str, dict]:
  """Scores images for held-out prompts, drawn with the first and with the final parameters.

  Returns `scores_before`, `scores`, and `gains`, each by task. `gains` has the mean change of the
  reward with a 95% interval over prompts.
  """
  resamples, seed = run.settings.evaluation.num_resamples, run.settings.seed
  params, _ = run.params()
  after = objective.measure(params, prompts)
  before = objective.measure(reference, prompts)
  gains = {}
  for task, first in before.items():
    change = np.subtract(after[task].pop("by_prompt"), first.pop("by_prompt"))
    names = [str(i) for i in range(len(change))]
    gains[task] = intervals.mean_interval(change, np.ones(len(change)), names, resamples, seed)
    shown = ", ".join(
      f"{name} {value:.3f} -> {after[task][name]:.3f}" for name, value in first.items()
    )
    low, high = gains[task]["low"], gains[task]["high"]
    interval = "" if low is None else f" [{low:+.3f}, {high:+.3f}]"
    distributed.print_once(
      f"reinforce: held-out prompts, {task}, before -> after: {shown}; "
      f"the reward changed by {gains[task]['mean']:+.3f}{interval}"
    )
  return {"scores_before": before, "scores": after, "gains": gains}


def _check(settings: Settings, workdir: epath.Path, init_from: str) -> None:
  """Raises UserError if --init_from is missing, or adapters or replays are requested."""
  if settings.tuned:
    raise UserError(
      f"config.adapter.rank is {settings.adapter.rank} and config.train.only is "
      f"{settings.train.only}, but cm3leon reinforce trains all parameters: they must be 0 and ()."
    )
  if settings.train.replay_every:
    raise UserError(
      f"config.train.replay_every is {settings.train.replay_every}, but cm3leon reinforce cannot "
      "replay steps: it must be 0."
    )
  if not init_from and not (workdir / "train" / "config.json").exists():
    raise UserError("name the run to start from: --init_from=workdir/scenes_instruct")


def _begin(
  settings: Settings, workdir: epath.Path, init_from: str, allowed: Sequence[str]
) -> tuple[dict, adapters.ParamsRef]:
  """Calls `resume.begin`. Raises UserError also if the run started from random parameters."""
  more: dict = {"reinforce": dataclasses.asdict(settings.reinforce)}
  if file := settings.reinforce.reward.rpartition(":")[0]:
    more["reinforce"]["reward_sha256"] = digests.digest(file)
  config, start = resume.begin(settings, workdir, init_from, more, allowed)
  if start is None:
    raise UserError(
      f"{workdir / 'train'} has a run that started from random parameters: use another --workdir."
    )
  return config, start


def main(settings: Settings, workdir: epath.Path, flags: shared_flags.Training) -> None:
  if os.environ.get("JAX_PLATFORMS") == "cpu":
    malloc.keep_freed()  # Before JAX starts its threads.

  options = {"init_from": flags.init_from, "allow_changed": flags.allow_changed}
  distributed.check_same_config({**dataclasses.asdict(settings), **options})
  # `reinforce` computes each step in one pass, even if the config accumulates gradients. Its result
  # is the last step, because rewards raise the held-out loss.
  one_pass = dataclasses.replace(settings.train, rows_per_device=0, patience=0)
  settings = dataclasses.replace(settings, train=one_pass)
  _check(settings, workdir, flags.init_from)
  mesh = common.make_mesh(settings)  # Detects a wrong mesh before any stage is read.
  if not flags.skip_memory_check:
    memory.check_devices(settings, mesh, memory.check_update)
  config, start = _begin(settings, workdir, flags.init_from, flags.allow_changed)
  folder = workdir / "train"
  redo = resume.resumes(folder, config, settings.train.steps, flags.allow_changed)
  stage = distributed.once(folder, config, redo)
  with jax.set_mesh(mesh), lease_lib.Lease(folder) as lease, stage as summary:
    if summary is None:
      resume.print_more(folder, "reinforce")
      return
    common.keep_compiled(workdir)
    run = run_lib.Run(workdir, settings)
    heldout = run.rows("heldout")
    reference = jax.tree.map(
      lambda x: x.astype(settings.model.dtype), run_lib.load_initial(start, settings)
    )
    objective, prompts = _objective(run, start, reference)
    resume.write_config(settings, workdir, config)
    training = decoder.DecoderTraining.of(
      settings,
      folder=folder,
      objective=objective,
      take_step=objective.take_step,
      heldout=heldout,
      initial_params=functools.partial(run_lib.load_initial, start, settings),
      evaluate_start=True,
    )
    result = decoder.train(training, lease)
    summary.update(result, machine=resume.machine())
    if before := result.get("heldout_before"):
      distributed.print_once(monitor.change_line(before, result))
    summary.update(_scores(run, objective, reference, prompts))


if __name__ == "__main__":
  common.run(main, shared_flags.Training, saves=True)

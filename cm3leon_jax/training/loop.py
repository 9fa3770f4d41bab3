"""The training loop."""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from cm3leon_jax import distributed
from cm3leon_jax.data.rows.loader import RowLoader
from cm3leon_jax.mesh import batch_shards, spec
from cm3leon_jax.models import transformer
from cm3leon_jax.models.config import ModelConfig
from cm3leon_jax.training.checkpoints import recovery
from cm3leon_jax.training.checkpoints.checkpoint import Checkpoints
from cm3leon_jax.training.config import OptimizerConfig, TrainConfig
from cm3leon_jax.training.faults import skipped_rows
from cm3leon_jax.training.faults.hang_watch import HangWatch
from cm3leon_jax.training.faults.lease import Lease
from cm3leon_jax.training.faults.preemption import StopSignal, check_end
from cm3leon_jax.training.faults.replay import replaying
from cm3leon_jax.training.faults.skipped_rows import GoBack
from cm3leon_jax.training.objective import NewestState, Objective, explaining
from cm3leon_jax.training.step.accumulation import on_mesh
from cm3leon_jax.training.step.numerics import check_finite
from cm3leon_jax.training.step.optimizer import learning_rate_schedule
from cm3leon_jax.training.steps import Steps, compile_steps
from cm3leon_jax.training.watch.goodput import Stopwatch
from cm3leon_jax.training.watch.heldout import evaluator, losses_at_start
from cm3leon_jax.training.watch.metrics import check_log
from cm3leon_jax.training.watch.monitor import Monitor, open_monitor
from cm3leon_jax.vocab import VocabLayout

REMEDY = "lower optimizer.learning_rate in a new --workdir; earlier checkpoints are unchanged."


@contextlib.contextmanager
def _opened(folder: epath.Path, config: TrainConfig, lease: Lease | None, go_back: GoBack | None):
  """Opens the folder of a run, which is measured, watched, and under a lease.

  Yields:
    (Checkpoints, Stopwatch, HangWatch, Lease).
  """
  keep = (config.keep_checkpoints, config.keep_every, config.keep_best)
  with (
    contextlib.closing(Stopwatch()) as watch,
    contextlib.nullcontext(lease) if lease else Lease(folder) as lease,
    HangWatch(folder, config.hang_minutes, watch) as hang,
    Checkpoints(folder, *keep, check=lease.check) as checkpoints,
  ):
    if go_back is not None:
      skipped_rows.go_back(checkpoints, folder, go_back)
    yield checkpoints, watch, hang, lease


def restore_or_init(
  folder: epath.Path, checkpoints: Checkpoints, steps: Steps, config: TrainConfig,
  initial_params: Callable[[], dict] | None = None,
):  # fmt: skip
  """Restores the newest checkpoint that is whole, or initializes a state.

  Args:
    folder: of the run.
    checkpoints: of the run.
    steps: of the run.
    config: of the run.
    initial_params: see `train`.

  Returns:
    (step of the checkpoint or None, state, next row).

  Raises:
    UserError: damaged checkpoints, or a log that says that checkpoints are missing.
  """
  newest = recovery.newest_whole(checkpoints)
  recovery.discard_unsealed(checkpoints)
  newest = checkpoints.newest() if newest is None else newest
  if newest is not None:
    return newest, *checkpoints.restore(jax.eval_shape(steps.init), newest, checked=True)
  check_log(folder, config.checkpoint_every)
  state = steps.init()  # The optimizer starts with the same state, whatever the parameters are.
  if initial_params is not None:
    params = initial_params()
    ema = None if state.ema is None else jax.tree.map(jnp.copy, params)  # Both are donated.
    state = dataclasses.replace(state, params=params, ema=ema)
  return None, state, 0


def _begin(
  objective: Objective, steps: Steps, state, next_row: int, config: TrainConfig, sharding,
  hang: HangWatch, lease: Lease,
) -> tuple[NewestState, Iterator]:  # fmt: skip
  """Begins the objective at a row, under the watch and the lease; some steps may be checked.

  Returns:
    (the function (state, batch) -> (state, metrics), batches).
  """
  steps = replaying(steps, config, state)
  take_step, data = objective.begin(steps, next_row, config.global_batch_size, sharding)
  take_step, data = hang.follow(lease.guard(take_step), data, int(state.step) + 1)
  return NewestState(take_step, int(state.step), next_row), data


def _run_steps(
  take_step: Callable, config: TrainConfig, state, next_row: int, data, heldout_losses: Callable,
  checkpoints: Checkpoints, monitor: Monitor, stop: StopSignal, sample_grid,
):  # fmt: skip
  """Trains to `config.steps`; at SIGTERM and Ctrl-C it saves and stops early.

  Args:
    take_step: (state, batch) -> (state, metrics).
    config: of the run.
    state: to continue from.
    next_row: of `data`.
    data: batches.
    heldout_losses: params -> losses, see `heldout.evaluate`.
    checkpoints: of the run.
    monitor: of the run.
    stop: set at SIGTERM and Ctrl-C.
    sample_grid: see `train`.

  Returns:
    (state, next row, last held-out losses, or None if no step was left; the exit code of a run
    that was asked to stop, or None; the step of the newest checkpoint, or 0).
  """
  losses, code, saved = None, None, int(state.step)
  for step in range(int(state.step) + 1, config.steps + 1):
    with monitor.traced(step):
      state, metrics = take_step(state, monitor.next_batch(data))
    next_row += config.global_batch_size
    monitor.step(step, metrics)
    code = stop.stopping()  # Read once: a later signal counts at the next step.
    last = step == config.steps or code is not None
    if step % config.eval_every == 0 or last:
      with monitor.phase("evaluate", step):
        losses = heldout_losses(state.eval_params)
        monitor.heldout(step, losses)
    # Before the checkpoint: a run that is killed here makes the grid again.
    if sample_grid and (step % config.sample_every == 0 or step == config.steps):
      with monitor.phase("sample", step):
        monitor.samples(step, sample_grid(state.eval_params, step))
    if (last or step % config.checkpoint_every == 0) and _must_save(
      step, config.steps, saved, code, monitor
    ):
      with monitor.phase("save", step):
        check_finite(state, f"checkpoint {step}", REMEDY)
        loss = losses["heldout_loss"] if losses else None  # With `keep_best`, of this very step.
        checkpoints.save(state, step, next_row, loss)
      saved = step
    if config.histogram_every and step % config.histogram_every == 0:
      monitor.histograms(step, state.params)
    checkpoints.check_save()
    if code is not None:
      break
  with monitor.phase("save", int(state.step)):
    checkpoints.close()
  return state, next_row, losses, code, saved


def _must_save(step: int, steps: int, saved: int, code: int | None, monitor: Monitor) -> bool:
  """Returns whether a step is saved that ends the run or an interval between checkpoints.

  Skipped steps change nothing. While steps are skipped nothing is saved, so the checkpoints stay
  those of before, except at the end of the run, and at a signal if it has taken a step since the
  newest checkpoint.
  """
  skipped = monitor.skipped_in_a_row()
  return step == steps or not skipped or (code is not None and skipped < step - saved)


def _summary(state, next_row: int, losses: dict, before: dict) -> dict:
  """Returns what `train` returns, of the held-out losses after the run and before it."""
  return {
    "steps": int(state.step),
    "parameters": transformer.count_params(state.params),
    "next_row": next_row,
    **losses,
    **({"heldout_before": before} if before else {}),
  }


def train(
  folder: epath.Path, model: ModelConfig, optimizer_config: OptimizerConfig, config: TrainConfig,
  vocab: VocabLayout, objective: Objective, heldout: RowLoader, seed: int,
  sample_grid: Callable[[dict, int], Any] | None = None, profile_steps: range = range(0),
  initial_params: Callable[[], dict] | None = None, evaluate_start: bool = False,
  lease: Lease | None = None, go_back: GoBack | None = None,
) -> dict:  # fmt: skip
  """Trains to `config.steps` from the newest checkpoint in `folder`, on the current mesh.

  Args:
    folder: gets checkpoints/, metrics/, tensorboard/ and profile/.
    model: size of the decoder.
    optimizer_config: AdamW and its schedule over `config.steps`.
    config: length of the run, and how often it saves, evaluates and samples.
    vocab: separates image codes from text.
    objective: what is learned, `Rows` or `reinforcement.rollouts.Rollouts`.
    heldout: rows for the held-out loss, see `DataConfig.for_heldout`.
    seed: of the parameters.
    sample_grid: (params, step) -> grid, a PIL image or None; called every `sample_every` steps
      with the parameters that are evaluated, see `TrainState.eval_params`.
    profile_steps: steps to trace.
    initial_params: makes the parameters of a run without a checkpoint; default: random ones.
    evaluate_start: whether the held-out loss is also computed before the first step, as step 0.
    lease: on the folder, if the caller holds it already.
    go_back: the checkpoint to continue from in place of the newest, and the rows that `objective`
      leaves out from now on.

  Returns:
    Numbers for the report; `heldout_before` has the held-out losses of step 0. At SIGTERM and
    Ctrl-C it saves and exits with its code, `INTERRUPTED` or `CTRL_C`, instead.

  Raises:
    UserError: an unfit mesh, damaged checkpoints, too many steps that are skipped, parameters that
      are not finite, or another job that trains in the folder.
  """
  config = on_mesh(config, batch_shards())
  sharding = NamedSharding(jax.sharding.get_mesh(), spec("batch", "length"))
  steps = compile_steps(model, optimizer_config, config, vocab, seed)
  with _opened(folder, config, lease, go_back) as (checkpoints, watch, hang, lease):
    newest, state, next_row = restore_or_init(folder, checkpoints, steps, config, initial_params)
    heldout_losses = evaluator(steps, heldout, config, sharding)
    take_step, data = _begin(objective, steps, state, next_row, config, sharding, hang, lease)
    with distributed.together():
      monitor = open_monitor(
        folder, model, config, learning_rate_schedule(optimizer_config, config.steps),
        objective.length, newest, watch, profile_steps, objective.names,
      )  # fmt: skip
    explained = explaining(objective, steps, take_step, config, sharding, folder)
    with StopSignal(sharding.mesh) as stop, explained, monitor:
      before = losses_at_start(state, newest, heldout_losses, monitor) if evaluate_start else {}
      state, next_row, losses, code, saved = _run_steps(
        take_step, config, state, next_row, data, heldout_losses, checkpoints, monitor, stop,
        sample_grid,
      )  # fmt: skip
  check_end(int(state.step), config.steps, folder, code, saved)
  losses = losses or heldout_losses(state.eval_params)  # If no step was left to train.
  return _summary(state, next_row, losses, before)

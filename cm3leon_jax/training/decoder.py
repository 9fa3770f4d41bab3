"""Trains the decoder: restores or initializes a state, and runs the loop with its hooks."""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from PIL import Image

from cm3leon_jax import distributed
from cm3leon_jax.checkpoints import recovery
from cm3leon_jax.checkpoints.checkpoint import Checkpoints
from cm3leon_jax.data.rows.loader import RowLoader
from cm3leon_jax.mesh import batch_shards, spec
from cm3leon_jax.models import transformer
from cm3leon_jax.models.config import ModelConfig
from cm3leon_jax.settings import Settings
from cm3leon_jax.training.config import OptimizerConfig, TrainConfig
from cm3leon_jax.training.faults import skipped_rows
from cm3leon_jax.training.faults.hang_watch import HangWatch
from cm3leon_jax.training.faults.lease import Lease
from cm3leon_jax.training.faults.preemption import StopSignal, check_end
from cm3leon_jax.training.faults.replay import replaying
from cm3leon_jax.training.faults.skipped_rows import GoBack
from cm3leon_jax.training.faults.skipped_steps import explaining
from cm3leon_jax.training.loop import run_steps
from cm3leon_jax.training.objective import Objective
from cm3leon_jax.training.saves.failed_saves import FailedSaves
from cm3leon_jax.training.saves.saving import Saves
from cm3leon_jax.training.step.accumulation import on_mesh
from cm3leon_jax.training.step.optimizer import learning_rate_schedule
from cm3leon_jax.training.step.state import TrainState
from cm3leon_jax.training.steps import Steps, compile_steps
from cm3leon_jax.training.watch.dispatch import Dispatch
from cm3leon_jax.training.watch.goodput import Stopwatch
from cm3leon_jax.training.watch.heldout import HeldoutLosses, evaluator
from cm3leon_jax.training.watch.histograms import Histograms
from cm3leon_jax.training.watch.metrics import check_log
from cm3leon_jax.training.watch.monitor import Monitor, open_monitor
from cm3leon_jax.training.watch.samples import SampleGrids
from cm3leon_jax.vocab import VocabLayout


@dataclasses.dataclass(frozen=True)
class DecoderTraining:
  """Everything that defines the training of a decoder.

  Attributes:
    folder: receives checkpoints/, metrics/, tensorboard/ and profile/.
    objective: the training objective, a `RowObjective` or a `reinforcement.rollouts.Rollouts`.
    heldout: rows for the held-out loss, see `DataConfig.for_heldout`.
    sample_grid: (params, step) -> a grid of samples as a PIL image, or None. Called every
      `sample_every` steps with `TrainState.eval_params`.
    initial_params: returns the parameters from which a run without a checkpoint starts; None: the
      run starts from random parameters.
    evaluate_start: whether to compute the held-out loss also before the first step, as step 0.
  """

  folder: epath.Path
  model: ModelConfig
  optimizer: OptimizerConfig
  config: TrainConfig
  vocab: VocabLayout
  objective: Objective
  heldout: RowLoader
  seed: int
  sample_grid: Callable[[dict, int], Image.Image | None] | None = None
  profile_steps: range = range(0)
  initial_params: Callable[[], dict] | None = None
  evaluate_start: bool = False

  @classmethod
  def of(cls, settings: Settings, **fields: Any) -> "DecoderTraining":
    """Creates the training from a run's settings. `fields` sets the remaining attributes."""
    return cls(
      model=settings.model,
      optimizer=settings.optimizer,
      config=settings.train,
      vocab=settings.vocab,
      seed=settings.seed,
      **fields,
    )


@contextlib.contextmanager
def _opened(
  folder: epath.Path, config: TrainConfig, lease: Lease | None, go_back: GoBack | None
) -> Iterator[tuple[Checkpoints, Stopwatch, HangWatch, Lease]]:
  """Takes the lease of a run's folder, starts its watches and opens its checkpoints."""
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
) -> tuple[int | None, TrainState, int]:  # fmt: skip
  """Restores the newest checkpoint that is not damaged, or initializes a state.

  `initial_params` is described in `DecoderTraining`. Returns (step of the checkpoint or None,
  state, next row).

  Raises:
    UserError: all checkpoints are damaged, or none is left although the log shows that the run
      passed a step at which it saves.
  """
  newest = recovery.newest_whole(checkpoints)
  recovery.discard_unsealed(checkpoints)
  newest = checkpoints.newest() if newest is None else newest
  if newest is not None:
    return newest, *checkpoints.restore(jax.eval_shape(steps.init), newest, checked=True)
  check_log(folder, config.checkpoint_every)
  state = steps.init()  # The initial state of the optimizer does not depend on the parameters.
  if initial_params is not None:
    params = initial_params()
    ema = None if state.ema is None else jax.tree.map(jnp.copy, params)  # Both get donated.
    state = dataclasses.replace(state, params=params, ema=ema)
  return None, state, 0


def _open_monitor(training: DecoderTraining, newest: int | None, watch: Stopwatch) -> Monitor:
  config, objective = training.config, training.objective
  with distributed.together():
    return open_monitor(
      training.folder,
      training.model,
      config,
      learning_rate_schedule(training.optimizer, config.steps),
      objective.length,
      newest,
      watch,
      training.profile_steps,
      objective.names,
    )


def _summary(state: TrainState, next_row: int, losses: dict, before: dict) -> dict:
  """Builds the result of `train` from the held-out losses after the run and `before` the run."""
  return {
    "steps": int(state.step),
    "parameters": transformer.count_params(state.params),
    "next_row": next_row,
    **losses,
    **({"heldout_before": before} if before else {}),
  }


def train(
  training: DecoderTraining, lease: Lease | None = None, go_back: GoBack | None = None
) -> dict:
  """Trains up to step `config.steps`, from the newest checkpoint, on the current mesh.

  At SIGTERM or Ctrl-C it saves and exits with the code `INTERRUPTED` or `CTRL_C`.

  Args:
    lease: lease on the folder, if the caller already holds it.
    go_back: an older checkpoint to continue from, and the rows that the objective leaves out from
      now on.

  Returns:
    A dict of numbers for the report. `heldout_before` has the held-out losses of step 0.

  Raises:
    UserError: the mesh cannot split the batch, all checkpoints are damaged, too many steps were
      skipped, a parameter is not finite, or another job trains in the folder.
  """
  config = on_mesh(training.config, batch_shards())
  training = dataclasses.replace(training, config=config)
  folder, objective = training.folder, training.objective
  sharding = NamedSharding(jax.sharding.get_mesh(), spec("batch", "length"))
  steps = compile_steps(training.model, training.optimizer, config, training.vocab, training.seed)
  with _opened(folder, config, lease, go_back) as (checkpoints, watch, hang, held):
    newest, state, next_row = restore_or_init(
      folder, checkpoints, steps, config, training.initial_params
    )
    heldout_losses = evaluator(steps, training.heldout, config, sharding)
    take_step, batches = objective.begin(
      replaying(steps, config, state), next_row, config.global_batch_size, sharding
    )
    done = int(state.step)
    hang.continue_after(done)
    monitor = _open_monitor(training, newest, watch)
    explained = explaining(objective, done, next_row, config.global_batch_size)
    with StopSignal(sharding.mesh) as stop, explained, monitor, Dispatch(monitor) as dispatch:
      losses = HeldoutLosses(heldout_losses, config, monitor, stop, training.evaluate_start, newest)
      saves = Saves(checkpoints, config, monitor, stop, losses, next_row)
      hooks = [
        dispatch,
        hang,
        held,
        monitor,
        stop,
        losses,
        # Sample before saving, so that a run killed here makes the grid again.
        SampleGrids(config, monitor, training.sample_grid),
        saves,
        Histograms(config.histogram_every, monitor),
        FailedSaves(checkpoints),
      ]
      state = run_steps(range(done + 1, config.steps + 1), take_step, state, batches, hooks)
  check_end(int(state.step), config.steps, folder, stop.code, saves.saved)
  # If there was no step left to train, the losses are not computed yet.
  found = losses.losses or heldout_losses(state.eval_params)
  return _summary(state, saves.next_row, found, losses.at_start)

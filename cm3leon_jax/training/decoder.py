"""The training of the decoder: what it opens, and the hooks of its loop."""

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
  """What a run trains, and how.

  Attributes:
    folder: gets checkpoints/, metrics/, tensorboard/ and profile/.
    model: size of the decoder.
    optimizer: AdamW and its schedule over `config.steps`.
    config: length of the run, and how often it saves, evaluates and samples.
    vocab: separates image codes from text.
    objective: what is learned, `RowObjective` or `reinforcement.rollouts.Rollouts`.
    heldout: rows for the held-out loss, see `DataConfig.for_heldout`.
    seed: of the parameters.
    sample_grid: (params, step) -> grid, a PIL image or None; called every `sample_every` steps
      with the parameters that are evaluated, see `TrainState.eval_params`.
    profile_steps: steps to trace.
    initial_params: makes the parameters of a run without a checkpoint; default: random ones.
    evaluate_start: whether the held-out loss is also computed before the first step, as step 0.
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
    """Describes the training of a run's settings; `fields` are the attributes that they lack."""
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
) -> tuple[int | None, TrainState, int]:  # fmt: skip
  """Restores the newest checkpoint that is whole, or initializes a state.

  Args:
    folder: of the run.
    checkpoints: of the run.
    steps: of the run.
    config: of the run.
    initial_params: see `DecoderTraining`.

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
  """Returns what `train` returns, of the held-out losses after the run and before it."""
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
  """Trains to `config.steps` from the newest checkpoint in the folder, on the current mesh.

  Args:
    training: what to train.
    lease: on the folder, if the caller holds it already.
    go_back: the checkpoint to continue from in place of the newest, and the rows that the objective
      leaves out from now on.

  Returns:
    Numbers for the report; `heldout_before` has the held-out losses of step 0. At SIGTERM and
    Ctrl-C it saves and exits with its code, `INTERRUPTED` or `CTRL_C`, instead.

  Raises:
    UserError: an unfit mesh, damaged checkpoints, too many steps that are skipped, parameters that
      are not finite, or another job that trains in the folder.
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
        # Before the checkpoint: a run that is killed here makes the grid again.
        SampleGrids(config, monitor, training.sample_grid),
        saves,
        Histograms(config.histogram_every, monitor),
        FailedSaves(checkpoints),
      ]
      state = run_steps(range(done + 1, config.steps + 1), take_step, state, batches, hooks)
  check_end(int(state.step), config.steps, folder, stop.code, saves.saved)
  found = losses.losses or heldout_losses(state.eval_params)  # If no step was left to train.
  return _summary(state, saves.next_row, found, losses.at_start)

"""Trains the decoder: restores or initializes a state, and runs the loop with its hooks."""

from collections.abc import Callable, Iterator
from concurrent import futures
import contextlib
import dataclasses
import functools
import time
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from PIL import Image

from cm3leon_jax import distributed
from cm3leon_jax.config.groups import Tuned
from cm3leon_jax.config.model import AdapterConfig, ModelConfig
from cm3leon_jax.config.settings import Settings
from cm3leon_jax.config.training import OptimizerConfig, TrainConfig, on_mesh
from cm3leon_jax.data.rows.loader import RowLoader
from cm3leon_jax.mesh import batch_shards, spec
from cm3leon_jax.models import groups, transformer
from cm3leon_jax.training.faults.hang_watch import HangWatch
from cm3leon_jax.training.faults.lease import Lease
from cm3leon_jax.training.faults.preemption import StopSignal, check_end
from cm3leon_jax.training.faults.replay import replaying
from cm3leon_jax.training.loop import run_steps
from cm3leon_jax.training.objective import Objective, explaining
from cm3leon_jax.training.saves.saving import Saves
from cm3leon_jax.training.step.optimizer import learning_rate_schedule
from cm3leon_jax.training.step.state import TrainState
from cm3leon_jax.training.steps import Steps, compile_steps
from cm3leon_jax.training.watch import flops, heldout
from cm3leon_jax.training.watch.boards import open_boards
from cm3leon_jax.training.watch.goodput import Stopwatch, earlier
from cm3leon_jax.training.watch.metrics import MetricsLog, check_log
from cm3leon_jax.training.watch.monitor import Monitor, SampleGrids
from cm3leon_jax.training.watch.traces import Profiler
from cm3leon_jax.vocab import VocabLayout
from cm3leon_jax.weights import recovery
from cm3leon_jax.weights.checkpoint import Checkpoints


@dataclasses.dataclass(frozen=True)
class DecoderTraining:
  """Model, config, data and callbacks of a decoder's training.

  Attributes:
    folder: receives checkpoints/, metrics/, tensorboard/ and profile/.
    objective: the training objective, a `RowObjective` or a `reinforcement.rollouts.Rollouts`.
    heldout: rows for the held-out loss, see `DataConfig.for_heldout`.
    sample_grid: (params, step) -> a grid of samples as a PIL image, or None. Called every
      `sample_every` steps with `TrainState.eval_params`.
    initial_params: returns the parameters from which a run without a checkpoint starts; None: the
      run starts from random parameters.
    evaluate_start: whether to compute the held-out loss also before the first step, as step 0.
    tuned: what is trained of a model that is otherwise frozen; None: all parameters are trained.
    frozen_params: returns the parameters of that model.
    take_step: (state, batch) -> (state, metrics); None: the cross-entropy of the batch's rows.
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
  tuned: Tuned | None = None
  frozen_params: Callable[[], dict] | None = None
  take_step: Callable | None = None

  @classmethod
  def of(cls, settings: Settings, **fields: Any) -> "DecoderTraining":
    """Creates the training from a run's settings. `fields` are the remaining attributes."""
    return cls(
      model=settings.model,
      optimizer=settings.optimizer,
      config=settings.train,
      vocab=settings.vocab,
      seed=settings.seed,
      tuned=settings.tuned,
      **fields,
    )


@contextlib.contextmanager
def _opened(
  folder: epath.Path, config: TrainConfig, lease: Lease | None
) -> Iterator[tuple[Checkpoints, Stopwatch, HangWatch, Lease]]:
  """Takes the lease of a run's folder, starts its two watches, and opens its checkpoints."""
  best = config.keep_best or int(config.patience > 0)
  keep = (config.keep_checkpoints, config.keep_every, best)
  with (
    contextlib.closing(Stopwatch()) as watch,
    contextlib.nullcontext(lease) if lease else Lease(folder) as lease,
    HangWatch(config.hang_minutes, watch) as hang,
    Checkpoints(folder, *keep, check=lease.check) as checkpoints,
  ):
    yield checkpoints, watch, hang, lease


def newest_checkpoint(checkpoints: Checkpoints) -> int | None:
  """Returns the step of the newest undamaged checkpoint, None without checkpoints.

  Raises:
    UserError: all checkpoints are damaged.
  """
  newest = recovery.newest_whole(checkpoints)
  recovery.discard_unsealed(checkpoints)
  return checkpoints.newest() if newest is None else newest


def restore_or_init(
  folder: epath.Path, checkpoints: Checkpoints, newest: int | None, steps: Steps,
  config: TrainConfig, initial_params: Callable[[], dict] | None = None,
) -> TrainState:  # fmt: skip
  """Restores the checkpoint of step `newest`, or initializes a state if it is None.

  `initial_params` is described in `DecoderTraining`.

  Raises:
    UserError: there is no checkpoint although the log shows that the run has passed a step at which
      it saves one.
  """
  if newest is not None:
    return checkpoints.restore(jax.eval_shape(steps.init), newest)[0]
  check_log(folder, config.checkpoint_every)
  state = steps.init()  # The initial state of the optimizer does not depend on the parameters.
  if initial_params is not None:
    params = initial_params()
    ema = None if state.ema is None else jax.tree.map(jnp.copy, params)  # Both are donated.
    state = dataclasses.replace(state, params=params, ema=ema)
  return state


def open_monitor(training: DecoderTraining, newest: int | None, watch: Stopwatch) -> Monitor:
  """Opens the monitor that logs and prints the metrics of a run; only process 0 writes and prints.

  `newest` is the step of the restored checkpoint, or None. `watch` has measured the time since this
  process began the training.
  """
  folder, config, objective = training.folder, training.config, training.objective
  log = MetricsLog(folder / "metrics", newest, enabled=jax.process_index() == 0)
  watch.add({} if newest is None else earlier(log.before, newest))
  skipped = sum(int(x.get("skipped", 0)) for x in log.before if x["step"] <= (newest or 0))
  devices = jax.sharding.get_mesh().devices
  kind = devices.flat[0].device_kind
  tokens = config.global_batch_size * objective.length
  rates = flops.Rates(
    flops.model_flops(training.model, tokens, objective.length, training.tuned),
    devices.size,
    config.peak_flops or flops.device_peak(kind),
  )
  first = 0 if newest is None else newest + 1  # Step 0 is the evaluation before the first step.
  boards = open_boards(folder, config, first, watch) if log.enabled else []
  peak = "of unknown peak, so no MFU (train.peak_flops sets one)"
  if rates.peak:
    peak = f"of {rates.peak / 1e12:,.1f} TFLOP/s each"
  distributed.print_once(
    f"train: {tokens:,} tokens and {rates.flops / 1e12:,.3g} model TFLOPs a step, "
    f"{devices.size} x {kind} {peak}."
  )
  schedule = learning_rate_schedule(training.optimizer, config.steps)
  profiler = Profiler(folder / "profile", training.profile_steps)
  return Monitor(log, watch, rates, schedule, config, profiler, boards, objective.names, skipped)


def _compile(training: DecoderTraining) -> tuple[DecoderTraining, Steps]:
  """Builds the steps. Loads the frozen parameters for them, and for the grids of samples."""
  steps = compile_steps(
    training.model, training.optimizer, training.config, training.vocab, training.seed,
    training.tuned,
  )  # fmt: skip
  if training.frozen_params is None or training.tuned is None:
    return training, steps
  dtype = jnp.dtype(training.model.dtype)
  base = groups.rest(training.frozen_params(), training.tuned)
  base = jax.tree.map(lambda x: x.astype(dtype), base)
  if (draw := training.sample_grid) is None:
    return training, steps.over(base)
  merge = jax.jit(functools.partial(groups.merge, tuned=training.tuned, model=training.model))

  def sample_grid(params: dict, step: int) -> Image.Image | None:
    return draw(merge(base, params), step)

  return dataclasses.replace(training, sample_grid=sample_grid), steps.over(base)


def _summary(
  training: DecoderTraining, state: TrainState, next_row: int, losses: dict,
  hook: heldout.HeldoutLosses,
) -> dict:  # fmt: skip
  """Builds the result of `train` from the held-out losses of the last step, and their hook."""
  trained = transformer.count_params(state.params)
  counts = {"parameters": trained}
  if training.tuned is not None:
    model = jax.eval_shape(lambda: transformer.init_params(training.model, jax.random.key(0)))
    kind = "adapter" if isinstance(training.tuned, AdapterConfig) else "trained"
    counts = {"parameters": transformer.count_params(model), f"{kind}_parameters": trained}
  return {
    "steps": int(state.step),
    **counts,
    "next_row": next_row,
    **losses,
    **({"heldout_before": hook.at_start} if hook.at_start else {}),
    **({"forgetting": hook.risen()} if hook.forgets else {}),
    **({"overfitting": True} if hook.overfits else {}),
    **({"best": hook.best[0]} if hook.best and hook.config.patience else {}),
  }


def _ahead(steps: Steps, batches: Iterator, num_sources: int) -> tuple[Steps, Iterator]:
  """Reads the first batch and compiles the train step in a thread, while the state is restored.

  The first batch, and the first call of the returned `train`, wait for the thread. What fails in it
  is raised there.
  """
  pool, mesh = futures.ThreadPoolExecutor(1), jax.sharding.get_mesh()
  batch = pool.submit(next, batches)

  def compile_train() -> None:
    with jax.set_mesh(mesh):
      steps.compile_train(batch.result(), num_sources)

  compiled = pool.submit(compile_train)

  def train(*args: Any, **more: Any) -> Any:
    compiled.result()
    return steps.train(*args, **more)

  def all_batches() -> Iterator:
    yield batch.result()
    yield from batches

  return dataclasses.replace(steps, train=train), all_batches()


def _step_function(training: DecoderTraining, steps: Steps, state: TrainState) -> Callable:
  if training.take_step is not None:
    return training.take_step
  steps = replaying(steps, training.config, state)
  return functools.partial(steps.train, num_sources=len(training.objective.names))


def step_seconds(training: DecoderTraining, count: int) -> float:
  """Returns the mean time of `count` steps from random parameters, in seconds. Saves nothing."""
  config = on_mesh(training.config, batch_shards())
  training, steps = _compile(dataclasses.replace(training, config=config))
  state = steps.init()
  take_step = _step_function(training, steps, state)
  batches = training.objective.batches(0, config.global_batch_size)
  ends = []
  for _ in range(count + 1):  # The first step compiles.
    state, metrics = take_step(state, next(batches))
    jax.block_until_ready(metrics)
    ends.append(time.monotonic())
  return (ends[-1] - ends[0]) / count


def train(training: DecoderTraining, lease: Lease | None = None) -> dict:
  """Trains up to step `config.steps`, from the newest checkpoint, on the current mesh.

  At SIGTERM or Ctrl-C it saves and exits with the code `INTERRUPTED` or `CTRL_C`.

  Args:
    lease: lease of the folder, if the caller has already taken it.

  Returns:
    Numbers for the report. `forgetting` or `overfitting` is present if it ended the training.

  Raises:
    UserError: the batch is not evenly divisible over the mesh, all checkpoints are damaged, too
      many steps were skipped, a parameter is not finite, or another job trains in the folder.
  """
  config = on_mesh(training.config, batch_shards())
  training = dataclasses.replace(training, config=config)
  folder, objective = training.folder, training.objective
  sharding = NamedSharding(jax.sharding.get_mesh(), spec("batch", "length"))
  with _opened(folder, config, lease) as (checkpoints, watch, hang, held):
    training, steps = _compile(training)
    newest = newest_checkpoint(checkpoints)
    next_row = 0 if newest is None else checkpoints.next_row(newest)
    batches = objective.batches(next_row, config.global_batch_size)
    if training.take_step is None and (newest or 0) < config.steps:
      steps, batches = _ahead(steps, batches, len(objective.names))
    state = restore_or_init(folder, checkpoints, newest, steps, config, training.initial_params)
    rows = heldout.heldout_batches(training.heldout, config, sharding)
    evaluate = functools.partial(heldout.evaluate, steps, rows, training.heldout.source_names)
    take_step = _step_function(training, steps, state)
    done = int(state.step)
    hang.continue_after(done)
    with distributed.together():
      monitor = open_monitor(training, newest, watch)
    explained = explaining(objective, done, next_row, config.global_batch_size)
    with StopSignal(sharding.mesh) as stop, explained, monitor:
      losses = heldout.HeldoutLosses(
        evaluate, config, monitor, stop, training.evaluate_start, newest,
        best=checkpoints.best(newest) if newest and config.patience else None,
      )  # fmt: skip
      saves = Saves(checkpoints, config, monitor, stop, losses, next_row)
      hooks = [
        monitor,
        hang,
        held,
        stop,
        losses,
        # Draw the grid before saving, so that a run killed in between draws it again.
        SampleGrids(config, monitor, training.sample_grid),
        saves,
      ]
      state = run_steps(range(done + 1, config.steps + 1), take_step, state, batches, hooks)
  check_end(int(state.step), config.steps, folder, stop.code, saves.saved)
  # If no step was left to train, the hook has not computed the losses.
  result = losses.losses or evaluate(state.eval_params)
  return _summary(training, state, saves.next_row, result, losses)

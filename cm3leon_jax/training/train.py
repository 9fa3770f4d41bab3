"""The training loop."""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import functools
from typing import Annotated, Any

from etils import epath
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt
import pydantic.dataclasses

from cm3leon_jax import distributed
from cm3leon_jax.config import STRICT
from cm3leon_jax.data.rows.loader import RowLoader
from cm3leon_jax.mesh import batch_shards, spec
from cm3leon_jax.models import transformer
from cm3leon_jax.models.config import ModelConfig
from cm3leon_jax.training.checkpoints import recovery
from cm3leon_jax.training.checkpoints.checkpoint import Checkpoints
from cm3leon_jax.training.faults import skipped_rows
from cm3leon_jax.training.faults.hang_watch import HangWatch
from cm3leon_jax.training.faults.lease import Lease
from cm3leon_jax.training.faults.preemption import StopSignal, check_end
from cm3leon_jax.training.faults.replay import checked_step, replaying
from cm3leon_jax.training.faults.skipped_rows import GoBack
from cm3leon_jax.training.objective import NewestState, Objective, explaining
from cm3leon_jax.training.step.accumulation import on_mesh
from cm3leon_jax.training.step.numerics import check_finite
from cm3leon_jax.training.step.optimizer import (
  OptimizerConfig,
  create_optimizer,
  learning_rate_schedule,
)
from cm3leon_jax.training.step.state import eval_step, init_state, row_losses, train_step
from cm3leon_jax.training.watch.goodput import Stopwatch
from cm3leon_jax.training.watch.heldout import evaluator, losses_at_start
from cm3leon_jax.training.watch.metrics import check_log
from cm3leon_jax.training.watch.monitor import Monitor, open_monitor
from cm3leon_jax.vocab import VocabLayout
from cm3leon_jax.xla_options import compiler_options

REMEDY = "lower optimizer.learning_rate in a new --workdir; earlier checkpoints are unchanged."


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class TrainConfig:
  """Length of the run, and how often it evaluates, saves, samples and prints.

  Defaults: the tutorial's 1.4T tokens in batches of 8,192 rows.
  """

  steps: PositiveInt = 41_723
  """Number of training steps."""
  minutes: NonNegativeFloat = 0.0
  """Minutes of all stages on two CPU cores, from which steps that are None follow, as in `own`."""
  global_batch_size: PositiveInt = 8_192
  """Rows of a step, over all devices (paper: 8M tokens, about 2,048 rows)."""
  gradient_accumulation_steps: PositiveInt = 1
  """Number of micro-batches of a step, one after the other; a divisor of `global_batch_size`."""
  rows_per_device: NonNegativeInt = 0
  """Rows that a device takes at once; the mesh then sets the number of micro-batches, so that one
  config runs on any slice. 0: `gradient_accumulation_steps` counts."""
  eval_every: PositiveInt = 500
  """Number of steps between two held-out losses."""
  eval_batches: PositiveInt = 4
  """Number of global batches that a held-out loss is computed on."""
  checkpoint_every: PositiveInt = 500
  """Number of steps between two checkpoints."""
  keep_checkpoints: Annotated[int, Field(ge=2)] = 2
  """Number of newest checkpoints that are kept; at least 2, as the last save may not be whole."""
  keep_every: NonNegativeInt = 0
  """Checkpoints of multiples of so many steps are kept, too; 0: none. A multiple of
  `checkpoint_every`."""
  keep_best: NonNegativeInt = 0
  """Number of checkpoints of the lowest held-out loss that are kept, too; `eval_every` must then
  divide `checkpoint_every`."""
  sample_every: PositiveInt = 2_000
  """Number of steps between two grids of samples."""
  num_samples: PositiveInt = 8
  """Number of images in a grid of samples."""
  log_every: PositiveInt = 1
  """Number of steps between printed lines; metrics.jsonl has every step."""
  tensorboard: bool = True
  """Whether TensorBoard event files are written."""
  metrics_port: Annotated[int, Field(ge=0, le=65_535)] = 0
  """Port at which process 0 serves metrics as text for Prometheus, to every address; 0: none."""
  hang_minutes: NonNegativeFloat = 30.0
  """Minutes without a step, or 10 of the longest steps if that is more, after which a job prints
  where every process stands and ends with exit code 1; 0: never."""
  wandb: str = ""
  """Project of Weights & Biases, PROJECT or ENTITY/PROJECT; empty: none."""
  max_skipped: NonNegativeInt = 10
  """Number of steps in a row that may be skipped because their loss or gradient is not finite, or
  because of `optimizer.skip_above`; one more stops the run."""
  replay_every: NonNegativeInt = 0
  """Number of steps between two that are computed again on other devices, to notice silent errors
  of the hardware; they take twice the state's memory; 0: none. 200 took 0.7% of the time of the
  steps on one CPU device, without network; each start also compiles two more programs."""
  replay_tolerance: Annotated[float, Field(ge=0, lt=1)] = 0.0
  """Difference between two computations of a step that is no error, as a share of the norm of an
  array's shard, e.g. 1e-2 where sums round differently each time; 0: all bits must be equal.
  Needs `replay_every`."""
  histogram_every: NonNegativeInt = 0
  """Number of steps between TensorBoard's histograms of the parameters; 0: none."""
  peak_flops: NonNegativeFloat = 0.0
  """Peak FLOP/s of one device, for MFU; 0: the peak of its kind, if that is known."""

  def __post_init__(self):
    if self.global_batch_size % self.gradient_accumulation_steps:
      raise ValueError(
        f"gradient_accumulation_steps = {self.gradient_accumulation_steps} does not divide "
        f"global_batch_size = {self.global_batch_size}."
      )
    if self.keep_every % self.checkpoint_every:
      raise ValueError(
        f"keep_every = {self.keep_every} is not a multiple of "
        f"checkpoint_every = {self.checkpoint_every}."
      )
    if self.keep_best and self.checkpoint_every % self.eval_every:
      raise ValueError(
        f"keep_best = {self.keep_best} needs a held-out loss of every checkpoint: "
        f"eval_every = {self.eval_every} must divide checkpoint_every = {self.checkpoint_every}."
      )
    if self.rows_per_device and self.gradient_accumulation_steps > 1:
      raise ValueError(
        f"rows_per_device = {self.rows_per_device} sets gradient_accumulation_steps, which is "
        f"{self.gradient_accumulation_steps}: leave it at 1, or set rows_per_device = 0."
      )
    if self.replay_tolerance and not self.replay_every:
      raise ValueError(
        f"replay_tolerance is {self.replay_tolerance:g}, and replay_every = 0 computes no step "
        "twice: set replay_every, or replay_tolerance = 0."
      )

  @property
  def micro_batch_size(self) -> int:
    """Rows that all devices take at once, once `on_mesh` has set the accumulation."""
    return self.global_batch_size // self.gradient_accumulation_steps


@dataclasses.dataclass(frozen=True)
class Steps:
  """The jitted functions of a run.

  Attributes:
    init: () -> state, with an average of the parameters if the optimizer's config has one.
    train: (state, batch) -> (state, metrics), see `state.train_step`; the state is donated.
    evaluate: (params, batch) -> sums, see `state.eval_step`. Like `train` it takes the static
      `num_sources` of rows that are marked with their sources.
    row_losses: (params, batch) -> loss of each row, see `state.row_losses`.
    checked: as `train`; also returns fingerprints, see `replay.checked_step`.
  """

  init: Callable
  train: Callable
  evaluate: Callable
  row_losses: Callable
  checked: Callable


def compile_steps(
  model: ModelConfig,
  optimizer_config: OptimizerConfig,
  config: TrainConfig,
  vocab: VocabLayout,
  seed: int,
) -> Steps:
  """Builds the functions for the current mesh; each is compiled at its first call."""
  optimizer = create_optimizer(optimizer_config, config.steps)

  def make_step(optimizer):
    return functools.partial(
      train_step,
      model,
      optimizer,
      vocab.text_size,
      config.gradient_accumulation_steps,
      z_loss=optimizer_config.z_loss,
      ema_decay=optimizer_config.ema_decay,
    )

  compile_step = functools.partial(
    jax.jit,
    donate_argnums=0,
    static_argnames="num_sources",
    compiler_options=compiler_options(jax.sharding.get_mesh()),
  )
  averaged = optimizer_config.ema_decay > 0
  return Steps(
    init=jax.jit(lambda: init_state(model, optimizer, jax.random.key(seed), averaged)),
    train=compile_step(make_step(optimizer)),
    evaluate=jax.jit(
      functools.partial(eval_step, model, vocab.text_size), static_argnames="num_sources"
    ),
    row_losses=jax.jit(functools.partial(row_losses, model)),
    checked=compile_step(checked_step(make_step, optimizer)),
  )


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

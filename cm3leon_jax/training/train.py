"""The training loop."""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import functools
import itertools
import sys
from typing import Annotated, Any, Protocol, runtime_checkable

from etils import epath
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
import numpy as np
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt
import pydantic.dataclasses

from cm3leon_jax import distributed
from cm3leon_jax.config import STRICT, UserError
from cm3leon_jax.data.pipeline import RowLoader, batches
from cm3leon_jax.mesh import batch_shards, spec
from cm3leon_jax.models import transformer
from cm3leon_jax.models.config import ModelConfig
from cm3leon_jax.training import loss
from cm3leon_jax.training.checkpoint import Checkpoints
from cm3leon_jax.training.goodput import Stopwatch
from cm3leon_jax.training.lease import Lease
from cm3leon_jax.training.metrics import check_log
from cm3leon_jax.training.monitor import Monitor, open_monitor
from cm3leon_jax.training.optimizer import OptimizerConfig, create_optimizer, learning_rate_schedule
from cm3leon_jax.training.preemption import StopSignal
from cm3leon_jax.training.state import eval_step, init_state, train_step
from cm3leon_jax.vocab import VocabLayout
from cm3leon_jax.xla_options import compiler_options

INTERRUPTED = 75  # Exit code of a run that saved and stopped at SIGTERM (EX_TEMPFAIL: try again).


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class TrainConfig:
  """Length of the run, and how often it evaluates, saves, samples and prints.

  Defaults: the tutorial's 1.4T tokens in batches of 8,192 rows.
  """

  steps: PositiveInt = 41_723
  """Number of training steps."""
  global_batch_size: PositiveInt = 8_192
  """Rows of a step, over all devices (paper: 8M tokens, about 2,048 rows)."""
  gradient_accumulation_steps: PositiveInt = 1
  """Number of micro-batches that a batch is split into, computed one after the other; a divisor
  of `global_batch_size`."""
  eval_every: PositiveInt = 500
  """Number of steps between two held-out losses."""
  eval_batches: PositiveInt = 4
  """Number of global batches that a held-out loss is computed on."""
  checkpoint_every: PositiveInt = 500
  """Number of steps between two checkpoints."""
  keep_checkpoints: Annotated[int, Field(ge=2)] = 2
  """Number of newest checkpoints that are kept; at least 2, because the previous checkpoint is
  needed until the next one is complete."""
  sample_every: PositiveInt = 2_000
  """Number of steps between two grids of samples."""
  num_samples: PositiveInt = 8
  """Number of images in a grid of samples."""
  log_every: PositiveInt = 1
  """Number of steps between printed lines; metrics.jsonl has every step."""
  tensorboard: bool = True
  """Whether TensorBoard event files are written."""
  wandb: str = ""
  """Project of Weights & Biases; empty: none."""
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

  @property
  def micro_batch_size(self) -> int:
    """Rows that all devices together take at once, in a train step and in an evaluation."""
    return self.global_batch_size // self.gradient_accumulation_steps


def check_batch(config: TrainConfig) -> None:
  """Raises UserError if the current mesh cannot split the batch."""
  parts = batch_shards() * config.gradient_accumulation_steps
  if config.global_batch_size % parts:
    raise UserError(
      f"config.train.global_batch_size is {config.global_batch_size}; mesh.data x mesh.fsdp x "
      f"mesh.fsdp_inner x train.gradient_accumulation_steps = {parts} must divide it."
    )


@dataclasses.dataclass(frozen=True)
class Steps:
  """The jitted functions of a run.

  Attributes:
    init: () -> state, with an average of the parameters if the optimizer's config has one.
    train: (state, batch) -> (state, metrics), see `state.train_step`; the state is donated.
    evaluate: (params, batch) -> sums, see `state.eval_step`. Like `train` it takes the static
      `num_sources` of rows that are marked with their sources.
  """

  init: Callable
  train: Callable
  evaluate: Callable


def compile_steps(
  model: ModelConfig,
  optimizer_config: OptimizerConfig,
  config: TrainConfig,
  vocab: VocabLayout,
  seed: int,
) -> Steps:
  """Builds the functions for the current mesh; each is compiled at its first call."""
  optimizer = create_optimizer(optimizer_config, config.steps)
  step = functools.partial(
    train_step,
    model,
    optimizer,
    vocab.text_size,
    config.gradient_accumulation_steps,
    z_loss=optimizer_config.z_loss,
    ema_decay=optimizer_config.ema_decay,
  )
  averaged = optimizer_config.ema_decay > 0
  return Steps(
    init=jax.jit(lambda: init_state(model, optimizer, jax.random.key(seed), averaged)),
    train=jax.jit(
      step,
      donate_argnums=0,
      static_argnames="num_sources",
      compiler_options=compiler_options(jax.sharding.get_mesh()),
    ),
    evaluate=jax.jit(
      functools.partial(eval_step, model, vocab.text_size), static_argnames="num_sources"
    ),
  )


@runtime_checkable
class Objective(Protocol):
  """What a run learns from.

  Attributes:
    names: of the sources that a batch is marked with, whose losses are logged.
    length: tokens of a row of the batch.
  """

  names: Sequence[str]

  @property
  def length(self) -> int:
    """Tokens of a row of the batch."""

  def begin(
    self, steps: Steps, next_row: int, rows: int, sharding: NamedSharding
  ) -> tuple[Callable, Iterator]:
    """Begins at a row.

    Args:
      steps: of the run.
      next_row: first row.
      rows: of a step.
      sharding: of the rows of a batch.

    Returns:
      `take_step(state, batch)`, which returns the new state and metrics, and the batches.
    """


@dataclasses.dataclass(frozen=True)
class Rows:
  """The objective of pretraining and of tuning: cross-entropy of the rows of a loader."""

  loader: RowLoader

  @property
  def names(self) -> Sequence[str]:
    """Names of the loader's sources."""
    return self.loader.source_names

  @property
  def length(self) -> int:
    """Tokens of a row."""
    return self.loader.plan.config.sequence_length

  def begin(
    self, steps: Steps, next_row: int, rows: int, sharding: NamedSharding
  ) -> tuple[Callable, Iterator]:
    """See `Objective`."""
    take_step = functools.partial(steps.train, num_sources=len(self.names))
    return take_step, batches(self.loader, next_row, rows, sharding)


def heldout_batches(heldout: RowLoader, config: TrainConfig, sharding) -> list:
  """Reads the rows of `eval_batches` global batches, in batches of the micro-batch size."""
  count = config.eval_batches * config.gradient_accumulation_steps
  return list(itertools.islice(batches(heldout, 0, config.micro_batch_size, sharding), count))


def evaluate(
  steps: Steps, params, eval_batches: list, sources: Sequence[str] = ()
) -> dict[str, float]:
  """Computes the held-out losses by modality, nats per target of the documents themselves.

  Args:
    steps: of the run.
    params: that are evaluated.
    eval_batches: of `heldout_batches`.
    sources: names of the sources that the rows are marked with, whose losses are added.
  """
  measure = functools.partial(steps.evaluate, num_sources=len(sources))
  totals = [jax.device_get(measure(params, batch)) for batch in eval_batches]
  sums = {name: np.sum([t[name] for t in totals], 0, np.float64) for name in totals[0]}
  losses = {**loss.modality_losses(sums), **loss.source_losses(sources, sums)}
  return {f"heldout_{name}": float(value) for name, value in losses.items()}


def _heldout_losses(
  steps: Steps, heldout: RowLoader, config: TrainConfig, sharding
) -> Callable[[dict], dict[str, float]]:
  """Reads the held-out rows, and returns a function params -> losses, see `evaluate`."""
  eval_batches = heldout_batches(heldout, config, sharding)
  return lambda params: evaluate(steps, params, eval_batches, heldout.source_names)


def _restore(checkpoints: Checkpoints, steps: Steps, initial_params: Callable[[], dict] | None):
  """Restores the newest checkpoint that is whole, or initializes a state.

  Args:
    checkpoints: of the run.
    steps: of the run.
    initial_params: see `train`.

  Returns:
    (step of the checkpoint or None, state, next row).
  """
  newest = checkpoints.newest_whole()
  checkpoints.discard_unsealed()
  newest = checkpoints.newest() if newest is None else newest
  if newest is None:
    state = steps.init()  # The optimizer starts with the same state, whatever the parameters are.
    if initial_params is not None:
      params = initial_params()
      ema = None if state.ema is None else jax.tree.map(jnp.copy, params)  # Both are donated.
      state = dataclasses.replace(state, params=params, ema=ema)
    return None, state, 0
  return newest, *checkpoints.restore(jax.eval_shape(steps.init), newest, checked=True)


def _evaluate_start(
  state, newest: int | None, heldout_losses: Callable, monitor: Monitor
) -> dict[str, float]:
  """Computes and logs the held-out losses of step 0; a continued run reads them from its log."""
  if newest is not None:
    return monitor.logged_heldout(0)
  with monitor.phase("evaluate", 0):
    losses = heldout_losses(state.eval_params)
    monitor.heldout(0, losses)
  return losses


def _run_steps(
  take_step: Callable, config: TrainConfig, state, next_row: int, data, heldout_losses: Callable,
  checkpoints: Checkpoints, monitor: Monitor, stop: StopSignal, sample_grid,
):  # fmt: skip
  """Trains to `config.steps`; at SIGTERM it saves and stops early.

  Args:
    take_step: (state, batch) -> (state, metrics).
    config: of the run.
    state: to continue from.
    next_row: of `data`.
    data: batches.
    heldout_losses: params -> losses, see `evaluate`.
    checkpoints: of the run.
    monitor: of the run.
    stop: set at SIGTERM.
    sample_grid: see `train`.

  Returns:
    (state, next row, last held-out losses, or None if no step was left).
  """
  losses = None
  for step in range(int(state.step) + 1, config.steps + 1):
    with monitor.traced(step):
      state, metrics = take_step(state, monitor.next_batch(data))
    next_row += config.global_batch_size
    monitor.step(step, metrics)
    stopping = stop.stopping()  # Read once: a later signal counts at the next step.
    last = step == config.steps or stopping
    if step % config.eval_every == 0 or last:
      with monitor.phase("evaluate", step):
        losses = heldout_losses(state.eval_params)
        monitor.heldout(step, losses)
    # Before the checkpoint: a run that is killed here makes the grid again.
    if sample_grid and (step % config.sample_every == 0 or step == config.steps):
      with monitor.phase("sample", step):
        monitor.samples(step, sample_grid(state.eval_params, step))
    if step % config.checkpoint_every == 0 or last:
      with monitor.phase("save", step):
        checkpoints.save(state, step, next_row)
    if config.histogram_every and step % config.histogram_every == 0:
      monitor.histograms(step, state.params)
    with monitor.overlapped("save"):
      checkpoints.seal()
    if stopping:
      break
  with monitor.phase("save", int(state.step)):
    checkpoints.close()
  return state, next_row, losses


def _check_end(step: int, steps: int, folder: epath.Path) -> None:
  """Exits with `INTERRUPTED` if the run stopped before its last step."""
  if step < steps:
    distributed.print_once(
      f"stopped at step {step} of {steps}; saved in {folder}: the same command continues."
    )
    sys.exit(INTERRUPTED)
  if step > steps:
    distributed.print_once(
      f"train: the run is at step {step} already, beyond train.steps = {steps}; "
      "nothing was trained."
    )


def train(
  folder: epath.Path, model: ModelConfig, optimizer_config: OptimizerConfig, config: TrainConfig,
  vocab: VocabLayout, objective: Objective, heldout: RowLoader, seed: int,
  sample_grid: Callable[[dict, int], Any] | None = None, profile_steps: range = range(0),
  initial_params: Callable[[], dict] | None = None, evaluate_start: bool = False,
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
    initial_params: makes the parameters that a run without a checkpoint starts from; default:
      random ones.
    evaluate_start: whether the held-out loss is also computed before the first step, as step 0.

  Returns:
    Numbers for the report; `heldout_before` has the held-out losses of step 0. At SIGTERM it saves
    and exits with `INTERRUPTED` instead.

  Raises:
    UserError: an unfit mesh, damaged checkpoints, a loss or gradient that is not finite, or another
      job that trains in the folder.
  """
  mesh = jax.sharding.get_mesh()
  with contextlib.closing(Stopwatch()) as watch, Lease(folder) as lease:
    check_batch(config)
    sharding = NamedSharding(mesh, spec("batch", "length"))
    steps = compile_steps(model, optimizer_config, config, vocab, seed)
    checkpoints = Checkpoints(folder, config.keep_checkpoints)
    newest, state, next_row = _restore(checkpoints, steps, initial_params)
    if newest is None:
      check_log(folder, config.checkpoint_every)
    heldout_losses = _heldout_losses(steps, heldout, config, sharding)
    take_step, data = objective.begin(steps, next_row, config.global_batch_size, sharding)
    schedule = learning_rate_schedule(optimizer_config, config.steps)
    with distributed.together():
      monitor = open_monitor(
        folder, model, config, schedule, objective.length, newest, watch, profile_steps,
        objective.names,
      )  # fmt: skip
    with StopSignal(mesh) as stop, monitor:
      before = _evaluate_start(state, newest, heldout_losses, monitor) if evaluate_start else {}
      state, next_row, losses = _run_steps(
        lease.guard(take_step), config, state, next_row, data, heldout_losses, checkpoints, monitor,
        stop, sample_grid,
      )  # fmt: skip
  _check_end(int(state.step), config.steps, folder)
  if losses is None:  # No step was left to train.
    losses = heldout_losses(state.eval_params)
  parameters = transformer.count_params(state.params)
  result = {"steps": int(state.step), "parameters": parameters, "next_row": next_row, **losses}
  return {**result, **({"heldout_before": before} if before else {})}

"""Config section of training: length of the run, and how often it evaluates, saves and prints."""

from typing import Annotated

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt
import pydantic.dataclasses

from cm3leon_jax.config import STRICT


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

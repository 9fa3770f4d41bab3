"""Config sections of training: the run, its optimizer, and learning from rewards."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
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

  def __post_init__(self) -> None:
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


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class OptimizerConfig:
  """The optimizer and its schedule.

  Defaults: the tutorial's learning rate and schedule (paper: 1.2e-4 for 7B, schedule unstated),
  OPT's other numbers.
  """

  name: Literal["adamw", "muon"] = "adamw"
  """`muon` (Jordan et al. 2024; as in Liu et al. 2025, https://arxiv.org/abs/2502.16982) makes the
  averaged gradients of the layers' matrices orthogonal; AdamW with Nesterov's momentum updates the
  rest. Both have one learning rate and weight decay, since Muon's updates are as large as AdamW's.
  """
  learning_rate: PositiveFloat = 1e-4
  """Peak learning rate, reached after `warmup_steps` of linear growth from 0."""
  warmup_steps: NonNegativeInt = 1_500
  """Number of steps over which the learning rate grows to its peak."""
  schedule: Literal["cosine", "linear"] = "cosine"
  """Shape of the decay from the peak to `final_fraction` of it at the last step."""
  final_fraction: Annotated[float, Field(ge=0, le=1)] = 0.1
  """Learning rate at the last step, as a share of the peak."""
  b1: Annotated[float, Field(ge=0, le=1)] = 0.9
  """Decay rate of Adam's first moment. Muon's is 0.95."""
  b2: Annotated[float, Field(ge=0, le=1)] = 0.95
  """Decay rate of Adam's second moment."""
  eps: PositiveFloat = 1e-8
  """Term that Adam adds to the root of the second moment."""
  weight_decay: NonNegativeFloat = 0.1
  """AdamW's weight decay, on all parameters but the scales of norms and, unless
  `decay_embeddings`, the tables of tokens and positions."""
  decay_embeddings: bool = True
  """Whether weight decay acts on the tables of tokens and positions."""
  clip_norm: PositiveFloat = 1.0
  """Bound of the global gradient norm."""
  skip_above: NonNegativeFloat = 0.0
  """Spikes: a step whose gradient norm is above `skip_above` x the moving average of the steps
  before is skipped, e.g. 10; 0: none is. Steps with a NaN or an infinity always are."""
  first_moment_dtype: Literal["float32", "bfloat16"] = "float32"
  """Dtype of Adam's first moment; `bfloat16` halves its memory: 2 of the 12 bytes that a
  parameter takes."""
  z_loss: NonNegativeFloat = 0.0
  """Weight in the loss of the squared log of the softmax's normalizer: 0, or about 1e-4 (PaLM,
  section 5)."""
  ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
  """Largest decay of the exponential moving average of the parameters, e.g. 0.999; 0: none. The
  decay of step t (from 0) is min(ema_decay, (1 + t) / (10 + t)), so the average of a short run
  is that of its last steps. A run that has the average evaluates, samples and exports it."""


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class ReinforceConfig:
  """Learning from rewards of own samples, by `cm3leon reinforce`."""

  tasks: Annotated[tuple[str, ...], Field(min_length=1)] = ("draw",)
  """Names of the tasks of `instructions` whose training records are the prompts; their target is
  an image."""
  samples: Annotated[int, Field(ge=2)] = 8
  """Samples of a prompt in a step, a divisor of `train.global_batch_size`, which counts samples."""
  reward: Literal["judge", "clip"] = "judge"
  """What scores a sample: `judge`, 1 if it is wholly right and else 0, of tasks over scenes; or
  `clip`, the cosine of image and caption."""
  temperature: PositiveFloat = 1.0
  """Divisor of the guided logits that samples are drawn from while learning, without top-k and
  top-p."""
  kl_weight: NonNegativeFloat = 0.05
  """Weight in the loss of KL(policy of the first parameters || policy), in nats per code: what the
  starting model may draw stays likely, so samples stay different and held-out images known."""
  heldout_prompts: Annotated[int, Field(ge=2)] = 64
  """Held-out prompts whose samples are scored before the first step and after the last one."""

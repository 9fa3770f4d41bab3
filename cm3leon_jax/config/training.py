"""Defines the config sections `train`, `optimizer` and `reinforce`."""

import dataclasses
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
import pydantic.dataclasses

from cm3leon_jax.config import own_functions
from cm3leon_jax.config.build import STRICT
from cm3leon_jax.config.groups import check_names
from cm3leon_jax.errors import UserError


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class TrainConfig:
  """Settings of the training loop: batch size, and when it evaluates, saves, samples and prints.

  The defaults train on 1.4T tokens, as in the tutorial that this project started from, in batches
  of 8,192 rows.
  """

  steps: PositiveInt = 41_723
  """Number of training steps."""
  only: tuple[str, ...] = ()
  """Groups of parameters that are trained, e.g. ("head.image",); the others are frozen, without
  gradients and optimizer state. `embed` is the input table (in `opt` also the output table, and the
  positions), `head` the output table, `layers` all layers and the final norm; `embed.image` and
  `head.image` are the rows of image codes, and `layers.N-M` the layers N to M, counted from 0. ():
  all parameters. A run with groups needs --init_from."""
  base: str = ""
  """Trained model from which `cm3leon run` starts if it is given no --init_from; `--init_from=none`
  starts from random parameters. Empty: the run starts from random parameters."""
  minutes: NonNegativeFloat = 0.0
  """Minutes that all stages may take; 0: no limit. If `steps` is None in the config, as in `own`,
  or a flag sets `minutes`, `cm3leon run` measures a step of the decoder and takes as many as fit,
  unless a flag sets `steps`. Other steps that are None are computed for two CPU cores."""
  global_batch_size: PositiveInt = 8_192
  """Rows per step over all devices (paper: 8M tokens, about 2,048 rows)."""
  gradient_accumulation_steps: PositiveInt = 1
  """Number of micro-batches per step, computed one after another; must divide
  `global_batch_size`."""
  rows_per_device: NonNegativeInt = 0
  """Rows of a micro-batch per device. The number of micro-batches then follows from the mesh, so
  that one config runs on any slice. 0: `gradient_accumulation_steps` sets the number."""
  eval_every: PositiveInt = 500
  """Number of steps between two evaluations of the held-out loss."""
  eval_batches: PositiveInt = 4
  """Number of global batches on which the held-out loss is computed."""
  checkpoint_every: PositiveInt = 500
  """Number of steps between two checkpoints."""
  keep_checkpoints: Annotated[int, Field(ge=2)] = 2
  """Number of newest checkpoints to keep; at least 2, because the last save may be incomplete."""
  keep_every: NonNegativeInt = 0
  """Also keeps every checkpoint whose step is a multiple of this number; 0 disables it. Must be a
  multiple of `checkpoint_every`."""
  keep_best: NonNegativeInt = 0
  """Also keeps this number of checkpoints with the lowest held-out loss; 0 disables it.
  `eval_every` must then divide `checkpoint_every`. With `patience`, only the checkpoint of the
  lowest loss is kept, so this must be 0."""
  patience: NonNegativeInt = 0
  """Ends the training after this number of evaluations in a row whose held-out loss is above the
  lowest one. The loss is that of image codes, or of all tokens if there are no image codes; in a
  tuning, only its own pairs count. The checkpoint of the lowest loss is saved, kept, and the result
  of the run. 0: the last checkpoint is the result."""
  sample_every: PositiveInt = 2_000
  """Number of steps between two grids of samples."""
  num_samples: PositiveInt = 8
  """Number of images in a grid of samples."""
  log_every: PositiveInt = 1
  """Number of steps between printed lines; metrics.jsonl records every step."""
  tensorboard: bool = True
  """Whether TensorBoard event files are written, if tensorboardX is installed."""
  metrics_port: Annotated[int, Field(ge=0, le=65_535)] = 0
  """Port at which process 0 serves metrics in Prometheus's text format, on all network interfaces;
  0: metrics are not served."""
  hang_minutes: NonNegativeFloat = 30.0
  """Minutes without a step after which a job prints where each process hangs and ends with exit
  code 1; 0: never. The limit is at least 10 times the longest step so far."""
  wandb: str = ""
  """Project of Weights & Biases, PROJECT or ENTITY/PROJECT; empty: Weights & Biases is not used."""
  max_forgetting: NonNegativeFloat = 0.0
  """Largest accepted rise of the held-out loss of the base's documents, as a share of this loss at
  step 0: 0.03 ends the training at the first evaluation with a rise above 3%. 0: no limit. Needs
  `data.base_documents`."""
  max_skipped: NonNegativeInt = 10
  """Number of consecutive steps that may be skipped because their loss or gradient is not finite,
  or because of `optimizer.skip_above`. The run stops when one more step is skipped."""
  replay_every: NonNegativeInt = 0
  """Number of steps between two checked steps; 0: no step is checked. A checked step is computed
  again on other devices, to detect silent errors of the hardware; all bits must be equal. It needs
  twice the memory of the state. With 200, the checks took 0.7% of the steps' time on one CPU
  device, without a network. Each start also compiles two more programs."""
  peak_flops: NonNegativeFloat = 0.0
  """Peak FLOP/s of one device, used to compute MFU; 0: the known peak of this kind of device."""

  def __post_init__(self) -> None:
    check_names(self.only)
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
        f"keep_best = {self.keep_best} needs a held-out loss for every checkpoint: "
        f"eval_every = {self.eval_every} must divide checkpoint_every = {self.checkpoint_every}."
      )
    if self.keep_best and self.patience:
      raise ValueError(f"keep_best is {self.keep_best}; it must be 0 with patience.")
    if self.rows_per_device and self.gradient_accumulation_steps > 1:
      raise ValueError(
        f"rows_per_device = {self.rows_per_device} sets gradient_accumulation_steps, which is "
        f"{self.gradient_accumulation_steps}: leave it at 1, or set rows_per_device = 0."
      )

  @property
  def micro_batch_size(self) -> int:
    """Rows of a micro-batch over all devices. Valid for a config that `on_mesh` returned."""
    return self.global_batch_size // self.gradient_accumulation_steps


def on_mesh(config: TrainConfig, shards: int) -> TrainConfig:
  """Replaces `rows_per_device`, if it is set, by the number of micro-batches on a mesh.

  For `shards`, see `mesh.batch_shards`.

    on_mesh(TrainConfig(global_batch_size=8_192, rows_per_device=4), 256)
    TrainConfig(global_batch_size=8_192, gradient_accumulation_steps=8, rows_per_device=0)

  Raises:
    UserError: the batch is not evenly divisible over the mesh.
  """
  rows, name = config.gradient_accumulation_steps, "gradient_accumulation_steps"
  if config.rows_per_device:
    rows, name = config.rows_per_device, "rows_per_device"
  parts = shards * rows
  if config.global_batch_size % parts:
    raise UserError(
      f"config.train.global_batch_size is {config.global_batch_size}; mesh.data x mesh.fsdp x "
      f"mesh.fsdp_inner x train.{name} = {shards} x {rows} = {parts} must divide it."
    )
  if not config.rows_per_device:
    return config
  steps = config.global_batch_size // parts
  return dataclasses.replace(config, gradient_accumulation_steps=steps, rows_per_device=0)


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class OptimizerConfig:
  """The optimizer and its learning rate schedule.

  The default learning rate and schedule come from the tutorial that this project started from
  (paper: 1.2e-4 for 7B, schedule not stated). The other defaults are OPT's.
  """

  name: Literal["adamw", "muon"] = "adamw"
  """`adamw`, or `muon` (Jordan et al. 2024; as in Liu et al. 2025,
  https://arxiv.org/abs/2502.16982). Muon orthogonalizes the averaged gradients of the layers'
  matrices. AdamW with Nesterov momentum updates the other parameters. Both use the same learning
  rate and weight decay, because Muon's updates are scaled to the size of AdamW's."""
  learning_rate: PositiveFloat = 1e-4
  """Peak learning rate, reached after `warmup_steps` of linear growth from 0."""
  warmup_steps: NonNegativeInt = 1_500
  """Number of steps over which the learning rate grows to its peak."""
  schedule: Literal["cosine", "linear", "wsd"] = "cosine"
  """Shape of the decay from the peak to `final_fraction` of it at the last step. `wsd` (warm-up,
  stable, decay; Hu et al. 2024, https://arxiv.org/abs/2404.06395) stays at the peak and falls
  linearly over the last steps."""
  decay_fraction: Annotated[float, Field(gt=0, le=1)] = 0.2
  """Share of the steps over which the learning rate falls with `schedule` `wsd`."""
  final_fraction: Annotated[float, Field(ge=0, le=1)] = 0.1
  """Learning rate at the last step, as a fraction of the peak."""
  b1: Annotated[float, Field(ge=0, le=1)] = 0.9
  """Decay rate of Adam's first moment. Muon always uses 0.95."""
  b2: Annotated[float, Field(ge=0, le=1)] = 0.95
  """Decay rate of Adam's second moment."""
  eps: PositiveFloat = 1e-8
  """Term that Adam adds to the square root of the second moment."""
  weight_decay: NonNegativeFloat = 0.1
  """Decoupled weight decay. It acts on all parameters except scales and biases of norms and, if
  `decay_embeddings` is off, the embedding tables of tokens and positions."""
  decay_embeddings: bool = True
  """Whether weight decay acts on the embedding tables of tokens and positions."""
  clip_norm: PositiveFloat = 1.0
  """Largest global norm of the gradients. Larger gradients are scaled down to it."""
  skip_above: NonNegativeFloat = 0.0
  """Skips a step whose gradient norm is above `skip_above` x the moving average of earlier norms,
  e.g. 10; 0 disables it. Steps with a NaN or an infinity are always skipped."""
  first_moment_dtype: Literal["float32", "bfloat16"] = "float32"
  """Dtype of Adam's first moment. `bfloat16` halves its memory, which saves 2 of the 12 bytes per
  parameter."""
  z_loss: NonNegativeFloat = 0.0
  """Weight of the squared log of the softmax normalizer in the loss: 0, or about 1e-4 (PaLM,
  section 5)."""
  ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
  """Largest decay of the exponential moving average of the parameters, e.g. 0.999; 0: no average.
  The decay at step t (from 0) is min(ema_decay, (1 + t) / (10 + t)), so in a short run the average
  covers only the last steps. A run with an average evaluates, samples from and exports the
  average."""


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class ReinforceConfig:
  """Reinforcement learning with `cm3leon reinforce`: the model learns from rewards of samples."""

  tasks: Annotated[tuple[str, ...], Field(min_length=1)] = ("draw",)
  """Names of tasks of `instructions`. The prompts come from their training records. Their target
  must be an image."""
  samples: Annotated[int, Field(ge=2)] = 8
  """Number of samples per prompt in a step; must divide `train.global_batch_size`, which counts
  samples."""
  reward: str = "judge"
  """Reward of a sample. `judge`: 1 if `evaluation.judge` finds the sample correct by the
  facts of its record, else 0. `clip` is the cosine similarity of the CLIP embeddings of image and
  caption. `path/own.py:blue` names a function of yours, (prompts, images, records) -> array of one
  score per image; see docs/reinforcement.md."""
  retrieve: NonNegativeInt = 0
  """Number of documents that are retrieved for each prompt that is only a caption. They come from
  the bank of the run, or of the run that it starts from."""
  rounds: PositiveInt = 4
  """Maximum number of rounds of sampling in a step. A round samples images for
  `train.global_batch_size` / `samples` prompts. Prompts whose samples all have the same reward are
  dropped, and the next round replaces them. 1: a step keeps the prompts of its only round."""
  temperature: PositiveFloat = 1.0
  """Divisor of the guided logits when samples are drawn for training; top-k and top-p are off."""
  kl_weight: NonNegativeFloat = 0.05
  """Weight in the loss of KL(initial policy || policy), in nats per code. This term
  keeps the policy close to the initial model, so that samples stay diverse."""
  diversity_weight: NonNegativeFloat = 0.0
  """Weight of diversity in a reward, which is multiplied by 1 + this weight x (D - mean of D over
  the samples of the prompt). D is the mean share of codes in which a sample differs from the other
  samples of its prompt. So of two correct samples, the more unusual one gets the higher reward
  (as in https://arxiv.org/abs/2509.02534). Rewards must not be negative."""
  heldout_prompts: Annotated[int, Field(ge=2)] = 64
  """Number of held-out prompts whose samples are scored before the first and after the last
  step."""

  def __post_init__(self) -> None:
    if self.reward not in ("judge", "clip") and not own_functions.is_function(self.reward):
      raise ValueError(
        f"reward is '{self.reward}'; it must be judge, clip, or a function of yours, "
        "as in path/own.py:blue."
      )

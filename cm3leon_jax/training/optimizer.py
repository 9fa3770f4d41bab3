"""AdamW with clipping, warm-up and decay."""

from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import optax
from pydantic import Field
import pydantic.dataclasses

from cm3leon_jax.config import STRICT


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class OptimizerConfig:
  """AdamW and its schedule.

  Defaults: the tutorial's learning rate and schedule (paper: 1.2e-4 for 7B, schedule unstated),
  OPT's other numbers.
  """

  learning_rate: Annotated[
    float,
    Field(
      gt=0, description="Peak learning rate, reached after `warmup_steps` of linear growth from 0."
    ),
  ] = 1e-4
  warmup_steps: Annotated[
    int, Field(ge=0, description="Number of steps over which the learning rate grows to its peak.")
  ] = 1_500
  schedule: Annotated[
    Literal["cosine", "linear"],
    Field(
      description="Shape of the decay from the peak to `final_fraction` of it at the last step."
    ),
  ] = "cosine"
  final_fraction: Annotated[
    float, Field(ge=0, le=1, description="Learning rate at the last step, as a share of the peak.")
  ] = 0.1
  b1: Annotated[float, Field(ge=0, le=1, description="Decay rate of Adam's first moment.")] = 0.9
  b2: Annotated[float, Field(ge=0, le=1, description="Decay rate of Adam's second moment.")] = 0.95
  eps: Annotated[
    float, Field(gt=0, description="Term that Adam adds to the root of the second moment.")
  ] = 1e-8
  weight_decay: Annotated[
    float,
    Field(
      ge=0,
      description="AdamW's weight decay, on all parameters but the scales of norms and, unless "
      "`decay_embeddings`, the tables of tokens and positions.",
    ),
  ] = 0.1
  decay_embeddings: Annotated[
    bool, Field(description="Whether weight decay acts on the tables of tokens and positions.")
  ] = True
  clip_norm: Annotated[float, Field(gt=0, description="Bound of the global gradient norm.")] = 1.0
  first_moment_dtype: Annotated[
    Literal["float32", "bfloat16"],
    Field(
      description="Dtype of Adam's first moment; `bfloat16` halves its memory: 2 of the 12 bytes "
      "that a parameter takes."
    ),
  ] = "float32"
  z_loss: Annotated[
    float,
    Field(
      ge=0,
      description="Weight in the loss of the squared log of the softmax's normalizer: 0, or about "
      "1e-4 (PaLM, section 5).",
    ),
  ] = 0.0


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
  """Learning rate as a function of the step; warm-up takes at most half of a short run."""
  warmup = min(config.warmup_steps, steps // 2)
  if config.schedule == "cosine":
    decay = optax.cosine_decay_schedule(
      config.learning_rate, max(1, steps - warmup), config.final_fraction
    )
  else:
    end = config.learning_rate * config.final_fraction
    decay = optax.linear_schedule(config.learning_rate, end, max(1, steps - warmup))
  return optax.join_schedules(
    [optax.linear_schedule(0.0, config.learning_rate, max(1, warmup)), decay], [warmup]
  )


def create_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
  """The optimizer of a run of `steps` steps; its state is laid out like the parameters."""
  kept_whole = {"scale"} if config.decay_embeddings else {"scale", "embed", "positions"}
  decayed = lambda params: jax.tree.map_with_path(
    lambda path, _: path[-1].key not in kept_whole, params
  )
  schedule, moment = learning_rate_schedule(config, steps), jnp.dtype(config.first_moment_dtype)
  adamw = optax.adamw(
    schedule,
    config.b1,
    config.b2,
    config.eps,
    mu_dtype=moment,
    weight_decay=config.weight_decay,
    mask=decayed,
  )
  return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)

"""AdamW with clipping, warm-up and decay."""

import dataclasses

import jax
import jax.numpy as jnp
import optax


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """Defaults: the tutorial's learning rate and schedule (paper: 1.2e-4 for 7B, schedule unstated), OPT's other numbers.

  Attributes:
    learning_rate: the peak, reached after `warmup_steps` of linear growth from 0.
    schedule: decay from the peak to `final_fraction` of it at the last step: `cosine` or `linear`.
    weight_decay: on all parameters but the scales of norms and, unless `decay_embeddings`, the tables of tokens and positions.
    clip_norm: bound of the global gradient norm.
    first_moment_dtype: `bfloat16` halves the first moment's memory: 2 of the 12 bytes that a parameter takes.
    z_loss: weight of the squared log of the softmax's normalizer in the loss, 0 or about 1e-4 (PaLM, section 5).
  """

  learning_rate: float = 1e-4
  warmup_steps: int = 1_500
  schedule: str = "cosine"
  final_fraction: float = 0.1
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.1
  decay_embeddings: bool = True
  clip_norm: float = 1.0
  first_moment_dtype: str = "float32"
  z_loss: float = 0.0

  def __post_init__(self):
    if self.first_moment_dtype not in ("float32", "bfloat16"):
      raise ValueError(
        f"first_moment_dtype is '{self.first_moment_dtype}'; it must be float32 or bfloat16."
      )
    if self.schedule not in ("cosine", "linear"):
      raise ValueError(f"schedule is '{self.schedule}'; it must be cosine or linear.")
    for field in ("learning_rate", "eps", "clip_norm"):
      if getattr(self, field) <= 0:
        raise ValueError(f"{field} is {getattr(self, field)}; it must be positive.")
    for field in ("b1", "b2", "final_fraction"):
      if not 0 <= getattr(self, field) <= 1:
        raise ValueError(f"{field} is {getattr(self, field)}; it must lie in [0, 1].")
    for field in ("warmup_steps", "weight_decay", "z_loss"):
      if getattr(self, field) < 0:
        raise ValueError(f"{field} is {getattr(self, field)}; it must not be negative.")


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

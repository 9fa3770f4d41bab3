"""AdamW with clipping, warm-up and decay."""

import dataclasses

import jax
import optax


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """Defaults: the tutorial's learning rate and schedule (paper: 1.2e-4 for 7B, schedule unstated), OPT's other numbers.

  Attributes:
    learning_rate: the peak, reached after `warmup_steps` of linear growth from 0.
    schedule: decay from the peak to `final_fraction` of it at the last step: `cosine` or `linear`.
    weight_decay: on all parameters but the scales of norms.
    clip_norm: bound of the global gradient norm.
  """

  learning_rate: float = 1e-4
  warmup_steps: int = 1_500
  schedule: str = "cosine"
  final_fraction: float = 0.1
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.1
  clip_norm: float = 1.0

  def __post_init__(self):
    if self.schedule not in ("cosine", "linear"):
      raise ValueError(f"schedule is '{self.schedule}'; it must be cosine or linear.")
    for field in ("learning_rate", "eps", "clip_norm"):
      if getattr(self, field) <= 0:
        raise ValueError(f"{field} is {getattr(self, field)}; it must be positive.")
    for field in ("b1", "b2", "final_fraction"):
      if not 0 <= getattr(self, field) <= 1:
        raise ValueError(f"{field} is {getattr(self, field)}; it must lie in [0, 1].")
    if self.warmup_steps < 0 or self.weight_decay < 0:
      raise ValueError(f"warmup_steps = {self.warmup_steps} and weight_decay = {self.weight_decay} must not be negative.")


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
  """Learning rate as a function of the step; warm-up takes at most half of a short run."""
  warmup = min(config.warmup_steps, steps // 2)
  if config.schedule == "cosine":
    decay = optax.cosine_decay_schedule(config.learning_rate, max(1, steps - warmup), config.final_fraction)
  else:
    end = config.learning_rate * config.final_fraction
    decay = optax.linear_schedule(config.learning_rate, end, max(1, steps - warmup))
  return optax.join_schedules([optax.linear_schedule(0.0, config.learning_rate, max(1, warmup)), decay], [warmup])


def create_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
  """The optimizer of a run of `steps` steps; its state is laid out like the parameters."""
  decayed = lambda params: jax.tree.map_with_path(lambda path, _: path[-1].key != "scale", params)
  return optax.chain(
    optax.clip_by_global_norm(config.clip_norm),
    optax.adamw(
      learning_rate_schedule(config, steps), config.b1, config.b2, config.eps, weight_decay=config.weight_decay, mask=decayed
    ),
  )

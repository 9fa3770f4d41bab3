"""Skips and counts steps with a gradient spike or a non-finite number; too many end the run."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32, PyTree
import numpy as np
import optax

from cm3leon_jax.errors import UserError

SETTLED = 20  # The mean of fewer norms is not reliable, so earlier steps never count as spikes.
SMALLEST_RATE = 0.01  # Weight of a new norm, once the mean covers about 100 norms.


class NormState(NamedTuple):
  """The state of `watch_norm`.

  Attributes:
    mean: moving average of the gradient norms of all steps that were not skipped.
    seen: number of steps that were not skipped.
  """

  mean: Float32[Array, ""]
  seen: Int32[Array, ""]
  spike: Bool[Array, ""]


def watch_norm(ratio: float) -> optax.GradientTransformation:
  """Detects spikes: gradients whose norm is above `ratio` x the mean of earlier norms.

  Leaves gradients unchanged. In the first 100 steps the mean covers all norms; after that it is a
  moving average. The mean is part of the optimizer's state, so a resumed run makes the same
  decisions as an uninterrupted run. The first SETTLED steps never count as spikes.
  """

  def init(params: PyTree) -> NormState:
    del params
    return NormState(jnp.float32(0), jnp.int32(0), jnp.bool_(False))

  def update(updates: PyTree, state: NormState, params: PyTree = None) -> tuple[PyTree, NormState]:
    del params
    norm = optax.tree.norm(updates).astype(jnp.float32)
    rate = jnp.maximum(1 / (state.seen + 1), SMALLEST_RATE)
    spike = (state.seen >= SETTLED) & (norm > ratio * state.mean)
    return updates, NormState(state.mean + rate * (norm - state.mean), state.seen + 1, spike)

  return optax.GradientTransformation(init, update)


def is_sound(
  value: Float32[Array, ""], norm: Float32[Array, ""], opt_state: optax.OptState
) -> Bool[Array, ""]:
  """Returns whether loss and gradient are finite and the gradient's norm is not a spike.

  `norm` is the gradient's norm. `opt_state` is the state after the step, with or without a
  `NormState`.
  """
  spike = optax.tree.get(opt_state, "spike", jnp.bool_(False))
  return jnp.isfinite(value) & jnp.isfinite(norm) & ~spike


@jax.jit
def _finite(leaves: list) -> list:
  return [jnp.isfinite(x).all() for x in leaves]


def not_finite(tree: PyTree) -> list[str]:
  """Returns the names of arrays that contain a NaN or an infinity, e.g. "params.embed"."""
  found = [
    (jax.tree_util.keystr(path, simple=True, separator="."), x)
    for path, x in jax.tree.leaves_with_path(tree)
    if jnp.issubdtype(x.dtype, jnp.inexact)
  ]
  finite = jax.device_get(_finite([x for _, x in found]))
  return [name for (name, _), is_finite in zip(found, finite) if not is_finite]


def check_finite(tree: PyTree, what: str, remedy: str) -> None:
  """Checks a state before it is saved. All processes of a job must call it.

  `what` names the state in the message, e.g. "checkpoint 500", and `remedy` ends the message.

  Raises:
    UserError: an array contains a NaN or an infinity.
  """
  if names := not_finite(tree):
    more = f" and {len(names) - 3} other arrays" if len(names) > 3 else ""
    raise UserError(
      f"{what} is not saved because of NaNs or infinities in {', '.join(names[:3])}{more}: {remedy}"
    )


class TooManySkippedError(UserError):
  """More consecutive steps, listed in `steps`, were skipped than `train.max_skipped` allows."""

  def __init__(self, message: str, steps: range):
    super().__init__(message)
    self.steps = steps


@dataclasses.dataclass
class SkipCounter:
  """Counts skipped steps.

  Attributes:
    most: maximum number of consecutive skipped steps.
    total: number of all skipped steps, including those of earlier starts.
    in_a_row: number of consecutive skipped steps up to the newest step, in this start.
  """

  most: int
  total: int = 0
  in_a_row: int = 0

  def add(self, step: int, values: dict[str, float]) -> None:
    """Updates the counters after a step. `values` contains loss, grad_norm and skipped (0 or 1).

    Raises:
      TooManySkippedError: more than `most` consecutive steps are skipped.
    """
    skipped = bool(values.get("skipped", 0))
    self.total += skipped
    self.in_a_row = self.in_a_row + 1 if skipped else 0
    if self.in_a_row <= self.most:
      return
    steps = range(step - self.in_a_row + 1, step + 1)
    before = f" after {self.most} others in a row (train.max_skipped)" if self.most else ""
    raise TooManySkippedError(
      f"step {step} is skipped{before}: its loss is {values['loss']:.4g}, the norm of its gradient "
      f"{values['grad_norm']:.4g}",
      steps,
    )


def finite_values(values: dict) -> dict:
  """Removes entries with a NaN or an infinity, which JSON cannot represent."""
  return {name: x for name, x in values.items() if not isinstance(x, float) or np.isfinite(x)}

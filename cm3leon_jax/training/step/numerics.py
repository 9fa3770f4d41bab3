"""Steps whose numbers are not sound: they change nothing, are counted, and end a run in the end."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32, PyTree
import numpy as np
import optax

from cm3leon_jax.config import UserError

SETTLED = 20  # Steps without which an average of norms says nothing.
SMALLEST_RATE = 0.01  # Of the moving average of norms: that of about the last 100 steps.


class NormState(NamedTuple):
  """The state of `watch_norm`.

  Attributes:
    mean: moving average of the norms of the gradients that were taken.
    seen: number of them.
    spike: whether the newest gradient is one.
  """

  mean: Float32[Array, ""]
  seen: Int32[Array, ""]
  spike: Bool[Array, ""]


def watch_norm(ratio: float) -> optax.GradientTransformation:
  """Notices gradients whose norm is above `ratio` x the mean of those before; changes none.

  The mean is that of all norms for 100 steps, then a moving average. It is part of the optimizer's
  state, so a resumed run decides as one that was never killed. There are no spikes among the first
  SETTLED steps.
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
  """Returns whether a step may be taken: loss and gradient are finite, and there is no spike.

  Args:
    value: the loss.
    norm: of the gradient.
    opt_state: after the step; that of `watch_norm` may be in it.
  """
  spike = optax.tree.get(opt_state, "spike", jnp.bool_(False))
  return jnp.isfinite(value) & jnp.isfinite(norm) & ~spike


def select(sound: Bool[Array, ""], new: PyTree, old: PyTree) -> PyTree:
  """Returns the tree `new` if `sound`, else `old`, which has the same types.

  Arrays are selected element by element, which the compiler fuses into what computes `new`: no
  array is copied, and `old` may be donated. A conditional would hold both trees.
  """
  return jax.tree.map(lambda x, y: jax.lax.select(sound, x, y), new, old)


@jax.jit
def _finite(leaves: list) -> list:
  return [jnp.isfinite(x).all() for x in leaves]


def not_finite(tree: PyTree) -> list[str]:
  """Names the arrays of a tree that hold a NaN or an infinity, e.g. "params.embed"."""
  found = [
    (jax.tree_util.keystr(path, simple=True, separator="."), x)
    for path, x in jax.tree.leaves_with_path(tree)
    if jnp.issubdtype(x.dtype, jnp.inexact)
  ]
  finite = jax.device_get(_finite([x for _, x in found]))
  return [name for (name, _), is_finite in zip(found, finite) if not is_finite]


def check_finite(tree: PyTree, what: str, remedy: str) -> None:
  """Checks a state before it is saved. All processes of a job must call it.

  Args:
    tree: of arrays.
    what: it is, for the message.
    remedy: what the user can do.

  Raises:
    UserError: an array holds a NaN or an infinity.
  """
  if names := not_finite(tree):
    more = f" and {len(names) - 3} other arrays" if len(names) > 3 else ""
    raise UserError(
      f"{what} is not saved: {', '.join(names[:3])}{more} hold NaNs or infinities: {remedy}"
    )


class TooManySkippedError(UserError):
  """More steps in a row were skipped than `train.max_skipped` allows.

  Attributes:
    steps: these steps.
  """

  def __init__(self, message: str, steps: range):
    super().__init__(message)
    self.steps = steps


class SkipCounter:
  """Counts skipped steps.

  Attributes:
    total: of the run.
    in_a_row: up to the newest step. It starts at 0 with every start of the trainer.
  """

  def __init__(self, most: int, total: int = 0):
    self.most, self.total, self.in_a_row = most, total, 0

  def add(self, step: int, values: dict[str, float]) -> None:
    """Counts a step.

    Args:
      step: its number.
      values: loss, grad_norm and skipped (0 or 1).

    Raises:
      TooManySkippedError: it is one too many in a row.
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
  """Returns the numbers that JSON has: no NaN and no infinity."""
  return {name: x for name, x in values.items() if not isinstance(x, float) or np.isfinite(x)}

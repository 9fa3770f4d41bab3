"""Builds a train step that also returns fingerprints of its inputs, gradients and results."""

from collections.abc import Callable

import optax

from cm3leon_jax.training.config import TrainConfig
from cm3leon_jax.training.faults.fingerprint import Fingerprint, fingerprint
from cm3leon_jax.training.step.state import TrainState

# Stages of a step whose fingerprints are compared, in the order in which an error spreads.
STAGES = {
  "read": "the state that it reads",
  "gradients": "gradients",
  "updates": "updates",
  "left": "the new state",
}


def checked_step(
  make_step: Callable[[optax.GradientTransformation], Callable],
  optimizer: optax.GradientTransformation,
) -> Callable:
  """Makes a train step that also returns the fingerprints of `STAGES`.

  `make_step` takes an optimizer and returns a step, (state, batch, num_sources) -> (state,
  metrics). The result is (state, batch, num_sources) -> (state, metrics, fingerprints).
  """

  def step(
    state: TrainState, batch: dict, num_sources: int = 0
  ) -> tuple[TrainState, dict, dict[str, Fingerprint]]:
    found = {"read": fingerprint(state)}

    def update(
      gradients: dict, opt_state: optax.OptState, params: dict
    ) -> tuple[dict, optax.OptState]:
      found["gradients"] = fingerprint(gradients)  # Clipping would spread an error to all arrays.
      updates, opt_state = optimizer.update(gradients, opt_state, params)
      found["updates"] = fingerprint(updates)
      return updates, opt_state

    watched = optax.GradientTransformation(optimizer.init, update)
    state, metrics = make_step(watched)(state, batch, num_sources=num_sources)
    return state, metrics, {**found, "left": fingerprint(state)}

  return step


def is_checked(config: TrainConfig, step: int) -> bool:
  """Returns whether `step` is checked. The call of a checked step waits for its end."""
  return bool(config.replay_every) and step % config.replay_every == 0

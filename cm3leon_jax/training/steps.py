"""Builds the jitted functions of a run for the current mesh."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import optax

from cm3leon_jax.config.groups import Tuned
from cm3leon_jax.config.model import ModelConfig
from cm3leon_jax.config.training import OptimizerConfig, TrainConfig
from cm3leon_jax.mesh import abstract
from cm3leon_jax.training.faults.fingerprint import fingerprint
from cm3leon_jax.training.step.optimizer import create_optimizer
from cm3leon_jax.training.step.state import TrainState, eval_step, init_state, train_step
from cm3leon_jax.vocab import VocabLayout
from cm3leon_jax.xla_options import compiler_options

# Parts of a step whose fingerprints are compared, in the order in which they are computed.
PARTS = {
  "read": "the state that it reads",
  "gradients": "gradients",
  "updates": "updates",
  "left": "the new state",
}


@dataclasses.dataclass(frozen=True)
class Steps:
  """The jitted functions of a run.

  Attributes:
    init: () -> state. The state has an average of the parameters if `ema_decay` is positive.
    train: (state, batch) -> (state, metrics), see `state.train_step`; the state is donated.
    evaluate: (params, batch) -> sums, see `state.eval_step`. If rows name their sources, `evaluate`
      and `train` take the number of sources as the static argument `num_sources`.
    checked: like `train`, but also returns fingerprints, see `checked_step`.
    base: the frozen parameters, if not all are trained. `train` and `evaluate` use them. `checked`,
      which also runs on other meshes, takes them as the argument `base`.
  """

  init: Callable
  train: Callable
  evaluate: Callable
  checked: Callable
  base: dict | None = None

  def over(self, base: dict) -> "Steps":
    """Returns these functions for the frozen parameters `base`, in the compute dtype."""
    train, evaluate = (functools.partial(step, base=base) for step in (self.train, self.evaluate))
    return dataclasses.replace(self, train=train, evaluate=evaluate, base=base)

  def compile_train(self, batch: dict, num_sources: int) -> None:
    """Compiles `train` for batches like this one, so that its first call need not."""
    state = abstract(jax.eval_shape(self.init), jax.sharding.get_mesh())
    train: Any = self.train
    step, more = (train, {}) if self.base is None else (train.func, {"base": self.base})
    step.lower(state, batch, num_sources=num_sources, **more).compile()


def compile_steps(
  model: ModelConfig,
  optimizer_config: OptimizerConfig,
  config: TrainConfig,
  vocab: VocabLayout,
  seed: int,
  tuned: Tuned | None = None,
) -> Steps:
  """Builds the functions for the current mesh. JAX compiles each function at its first call.

  `tuned` says what is trained of a frozen model, which the functions then need (`Steps.over`).
  """
  optimizer = create_optimizer(optimizer_config, config.steps)

  def make_step(optimizer: optax.GradientTransformation) -> Callable:
    return functools.partial(
      train_step,
      model,
      optimizer,
      vocab.text_size,
      config.gradient_accumulation_steps,
      z_loss=optimizer_config.z_loss,
      ema_decay=optimizer_config.ema_decay,
      tuned=tuned,
    )

  compile_step = functools.partial(
    jax.jit,
    donate_argnums=0,
    static_argnames="num_sources",
    compiler_options=compiler_options(jax.sharding.get_mesh()),
  )
  averaged = optimizer_config.ema_decay > 0
  return Steps(
    init=jax.jit(lambda: init_state(model, optimizer, jax.random.key(seed), averaged, tuned)),
    train=compile_step(make_step(optimizer)),
    evaluate=jax.jit(
      functools.partial(eval_step, model, vocab.text_size, tuned=tuned),
      static_argnames="num_sources",
    ),
    checked=compile_step(checked_step(make_step, optimizer)),
  )


def checked_step(
  make_step: Callable[[optax.GradientTransformation], Callable],
  optimizer: optax.GradientTransformation,
) -> Callable:
  """Builds a train step that also returns the fingerprints of `PARTS`.

  `make_step` takes an optimizer and returns a step, (state, batch, num_sources, base) -> (state,
  metrics). The result takes the same arguments and returns (state, metrics, fingerprints).
  """

  def step(
    state: TrainState, batch: dict, num_sources: int = 0, base: dict | None = None
  ) -> tuple[TrainState, dict, dict[str, jax.Array]]:
    result = {"read": fingerprint(state)}

    def update(
      gradients: dict, opt_state: optax.OptState, params: dict
    ) -> tuple[dict, optax.OptState]:
      # Gradients before clipping, which would spread an error to all arrays.
      result["gradients"] = fingerprint(gradients)
      updates, opt_state = optimizer.update(gradients, opt_state, params)
      result["updates"] = fingerprint(updates)
      return updates, opt_state

    watched = optax.GradientTransformation(optimizer.init, update)
    state, metrics = make_step(watched)(state, batch, num_sources=num_sources, base=base)
    return state, metrics, {**result, "left": fingerprint(state)}

  return step


def is_checked(config: TrainConfig, step: int) -> bool:
  """Returns whether `step` is checked. The function of a checked step returns only at its end."""
  return bool(config.replay_every) and step % config.replay_every == 0

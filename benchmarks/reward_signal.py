"""Measures how much `cm3leon reinforce` can learn from the prompts of a config, without training.

  python -m benchmarks.reward_signal --model=scenes-instruct

Draws the samples of some training steps with the parameters of the model. Prints, for each task,
the share of groups (the samples of one prompt) whose samples are all right, all wrong, or mixed:
only mixed groups have advantages. Also prints the cosine of the gradients of two halves of a step's
groups: near 0, one step's gradient is mostly noise. `--mixed` computes gradients of mixed groups
only, as if a step drew new prompts until its batch is full. --config.reinforce.retrieve=0 and
further overrides work as for cm3leon reinforce.
"""

# G samples per prompt.

from collections.abc import Callable, Sequence
import functools
import time

from absl import app, flags, logging
import jax
from ml_collections import config_flags
import numpy as np

from cm3leon_jax.mesh import create_mesh
from cm3leon_jax.reinforcement.rollouts import Group, Rollouts, open_rollouts
from cm3leon_jax.settings import settings_from_config
from cm3leon_jax.trained.run import Run
from cm3leon_jax.training.step import grpo


def shares(rewards: Sequence[np.ndarray], best: float = 1.0) -> dict[str, float]:
  """Returns the shares of groups without spread, by their reward, and of the mixed groups.

    rewards [[1 1] [0 0] [0 1] [0 0]] -> {"right": 0.25, "wrong": 0.5, "mixed": 0.25}

  Args:
    rewards: [G] rewards of each group.
    best: reward of a sample that is right.
  """
  dead = [np.ptp(group) == 0 for group in rewards]
  right = [equal and group[0] == best for equal, group in zip(dead, rewards)]
  count = len(rewards)
  return {
    "right": sum(right) / count,
    "wrong": (sum(dead) - sum(right)) / count,
    "mixed": 1 - sum(dead) / count,
  }


def cosines(gradients: Sequence[np.ndarray]) -> tuple[float, float]:
  """Returns the mean cosine of all pairs of gradients, and its standard error.

  The error is that of the jackknife over gradients, since pairs that share one are dependent.
  """
  unit = np.stack([x / max(np.linalg.norm(x), 1e-30) for x in gradients])
  table, count = unit @ unit.T, len(gradients)
  pairs = (table.sum() - np.trace(table)) / (count * (count - 1))
  without = []
  for i in range(count):
    kept = np.delete(np.delete(table, i, 0), i, 1)
    without.append((kept.sum() - np.trace(kept)) / ((count - 1) * (count - 2)))
  error = np.sqrt((count - 1) / count * np.sum((without - np.mean(without)) ** 2))
  return float(pairs), float(error)


def gradient_of(objective: Rollouts) -> Callable[[dict, grpo.Rollout], np.ndarray]:
  """Returns a function (params, rollout) -> gradient of the loss without KL, flattened."""
  settings = objective.settings
  fixed = (settings.model, settings.vocab.text_size)
  temperature = settings.reinforce.temperature

  @jax.jit
  def compute(params: dict, rollout: grpo.Rollout) -> dict:
    log_probs = functools.partial(grpo.guided_log_probs, *fixed, temperature)
    reference = jax.lax.stop_gradient(log_probs(params, rollout))
    loss = functools.partial(grpo.policy_loss, *fixed, 0.0, temperature)
    return jax.grad(loss, has_aux=True)(params, reference=reference, rollout=rollout)[0]

  def flattened(params: dict, rollout: grpo.Rollout) -> np.ndarray:
    grads = jax.device_get(compute(params, grpo.place(rollout)))
    return np.concatenate([x.ravel() for x in jax.tree.leaves(grads)])

  return flattened


def measure(objective: Rollouts, params: dict, steps: int, only_mixed: bool) -> None:
  """Draws the samples of `steps` rounds, and prints the shares and the cosine."""
  settings, pipeline = objective.settings, objective.pipeline_of(params)
  each = settings.train.global_batch_size // settings.reinforce.samples
  groups: list[Group] = []
  times = [time.process_time()]
  for step in range(steps):
    numbers = range(step * each, (step + 1) * each)
    prompts = [objective.prompts[number % len(objective.prompts)] for number in numbers]
    groups += objective.groups(pipeline, prompts, numbers, objective.sampling)
    times.append(time.process_time())
  by_task = {"all": groups}
  for group in groups:
    by_task.setdefault(group.prompt.task.name, []).append(group)
  for name, of_task in by_task.items():
    rewards = [group.rewards for group in of_task]
    kinds = shares(rewards)
    if settings.reinforce.reward != "judge":  # No reward of other kinds is that of a right sample.
      kinds = {"mixed": kinds["mixed"]}
    found = ", ".join(f"{kind} {share:.3f}" for kind, share in kinds.items())
    print(f"{name}: {len(of_task)} groups, reward {np.mean(rewards):.3f}, {found}", flush=True)
  print(f"processor seconds to sample a batch: {np.median(np.diff(times)):.1f}")
  used = [group for group in groups if not (only_mixed and group.is_dead)]
  size, compute, gradients = each // 2, gradient_of(objective), []
  times = [time.process_time()]
  for i in range(0, len(used) - size + 1, size):
    half = used[i : i + size]
    if not all(group.is_dead for group in half):
      gradients.append(compute(params, objective.rollout(pipeline, half)))
      times.append(time.process_time())
  if len(gradients) > 2:
    mean, error = cosines(gradients)
    print(f"cosine of {len(gradients)} halves of {size} groups: {mean:.3f} +- {error:.3f}")
    print(f"processor seconds of a half's gradient: {np.median(np.diff(times)):.1f}")


def main(argv: Sequence[str]) -> None:
  del argv
  args = flags.FLAGS
  logging.set_verbosity(logging.WARNING)
  config = args.config
  config.train.steps = args.steps
  config.reinforce.rounds = 1
  config.reinforce.diversity_weight = 0.0  # Measures the signal of the rewards alone.
  run = Run.open(args.model, settings_from_config(config))
  with jax.set_mesh(create_mesh(run.settings.mesh)):
    params, _ = run.params()
    objective, _ = open_rollouts(run, params, run.bank)
    measure(objective, params, args.steps, args.mixed)


if __name__ == "__main__":  # Tests import this module without flags.
  config_flags.DEFINE_config_file("config", "ml_configs/scenes_reinforce.py", "Config file.")
  flags.DEFINE_string("model", "scenes-instruct", "Run or bundle that draws the samples.")
  flags.DEFINE_integer("steps", 16, "Number of steps whose samples are drawn.", lower_bound=1)
  flags.DEFINE_bool("mixed", False, "Compute gradients of mixed groups only.")
  app.run(main)

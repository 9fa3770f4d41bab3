"""Trains the tuned scenes model with rewards: it draws images, which the judge grades.

  python -m examples.scenes.make_instructions workdir/scene_prompts --tasks=draw --seed=2 \\
    --records=6000 --heldout=2000
  cm3leon reinforce --config=examples/scenes/reinforce.py \\
    --workdir=workdir/reinforced --init_from=workdir/scenes_instruct

The variant is about the time in minutes that `cm3leon reinforce` takes on two cores (default 30).
It scales only the steps.
"""

import ml_collections

from cm3leon_jax.configs import defaults
from examples.scenes import instruct

STEPS = 80  # Steps that fit in 15 minutes.


def get_config(variant: str = "30") -> ml_collections.ConfigDict:
  steps = max(4, round(STEPS * defaults.scale_of(variant, named=())))
  config = instruct.get_config()
  # With their seed, the scenes differ from those of other trainings, but not all of their captions.
  config.instructions.tasks = "workdir/scene_prompts/tasks.yaml"
  # Only the held-out records of the run's tasks are read as rows.
  config.instructions.update(max_records=50, replay_share=0.0)
  config.optimizer.update(name="adamw", learning_rate=3e-4, warmup_steps=10)
  config.optimizer.update(weight_decay=0.0, ema_decay=0.9)
  config.train.update(steps=steps, global_batch_size=64, log_every=5)
  config.train.update(eval_every=max(2, steps // 2), eval_batches=2)
  config.train.update(checkpoint_every=max(2, steps // 10))
  # Training samples at the temperature at which users sample. At a higher temperature, samples fail
  # in ways that users never see.
  temperature = config.sampling.temperature
  config.reinforce.update(tasks=("draw",), samples=8, temperature=temperature)
  config.reinforce.update(heldout_prompts=100, kl_weight=0.03, diversity_weight=1.0)
  config.reinforce.update(retrieve=config.data.num_neighbors, rounds=4)
  return config

"""Instruction tuning of the demo's model: it draws, edits, describes and answers questions.

  bash launch/demo_instructions.sh
  python -m launch.train --config=ml_configs/scenes_instruct.py:15 \\
    --workdir=workdir/scenes_instruct --init_from=scenes

The variant is the time in minutes that all stages may take on two cores (default 15); it scales
only the steps of the training. `long` has 9,000 steps on more records, about 70 minutes on two
idle cores.
"""

from cm3leon_jax.configs import base, scenes

STEPS, LONG_STEPS = 1_600, 9_000


def get_config(variant: str = "15"):
  scale = base.scale_of(variant, "scenes_instruct")
  config = scenes.get_config("long")  # The model of the bundle.
  config.scenes.update({"train": 8_000})  # Of them some are replayed.
  config.instructions.update({"tasks": "scenes", "loss_on": "target", "replay_share": 0.1})
  steps = LONG_STEPS if variant == "long" else max(10, round(STEPS * scale))
  # The rate stays high until tasks that are learned late, in sudden steps, have begun.
  config.optimizer.update({"schedule": "wsd", "decay_fraction": 0.25, "ema_decay": 0.99})
  config.optimizer.update({"learning_rate": 2e-3, "warmup_steps": 50})
  # The most likely text; and edits that follow the image and the instruction as they are.
  config.sampling.update({"text_top_k": 1, "image_guidance": 1.0, "edit_guidance": 1.25})
  config.train.update({"steps": steps, "global_batch_size": 4, "eval_batches": 16})
  config.train.update({"checkpoint_every": min(400, max(5, steps // 12))})
  config.train.update({"eval_every": max(5, steps // 8), "sample_every": max(5, steps // 3)})
  if variant == "long":
    config.optimizer.update({"warmup_steps": 100, "ema_decay": 0.998})
  else:
    config.instructions.update({"max_records": 3_000})  # More are not read in so few steps.
  return config

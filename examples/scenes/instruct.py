"""Tunes the demo's model on instructions: it draws, edits, describes and answers questions.

  bash launch/demo_instructions.sh
  python -m examples.scenes.make_instructions workdir/scene_instructions
  cm3leon run --config=examples/scenes/instruct.py:15 \\
    --workdir=workdir/scenes_instruct --init_from=scenes
  python -m examples.scenes.grade --workdir=workdir/scenes_instruct

The variant is the time in minutes that all stages may take on two cores (default 15). It scales
only the training steps. The variant `long` is the recipe of the bundled model: it trains 10,000
steps on more records. In half of these records, the image tokenizer has encoded and decoded the
input image, so that it looks like a generated image.
"""

import ml_collections

from cm3leon_jax.configs import defaults
from cm3leon_jax.stages import from_data
from examples.scenes import config as scenes

STEPS, LONG_STEPS = 1_600, 10_000
TASKS = "workdir/scene_instructions/tasks.yaml"  # `make_instructions` writes it.


def get_config(variant: str = "15") -> ml_collections.ConfigDict:
  scale = defaults.scale_of(variant)
  config = scenes.get_config("long")  # The config of the bundled model.
  config.raw.options.train = 8_000  # Only replay reads these scenes.
  config.instructions.update(tasks=TASKS, loss_on="target", replay_share=0.1)
  # A small decoder that reads the instruction after the image often changes other objects, too.
  config.instructions.update(instruction_first=True)
  steps = LONG_STEPS if variant == "long" else round(STEPS * scale)
  config.optimizer.update(learning_rate=2.5e-3, warmup_steps=50, ema_decay=0.99)
  # Text is decoded greedily. Edits use almost no guidance.
  config.sampling.update(text_top_k=1, image_guidance=1.0, edit_guidance=1.25)
  config.train.update(steps=max(10, steps), eval_batches=16)
  config.train.update(from_data.intervals(steps))
  if variant == "long":
    config.optimizer.update(learning_rate=2e-3, warmup_steps=100, ema_decay=0.998)
    config.instructions.update(max_records=12_000, redrawn=0.5)
  else:
    config.instructions.update(max_records=3_000)  # A short training does not need more.
  return config

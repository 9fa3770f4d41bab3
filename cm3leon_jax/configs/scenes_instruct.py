"""Tunes the demo's model on instructions: it draws, edits, describes and answers questions.

  bash launch/demo_instructions.sh
  cm3leon train --config=scenes_instruct:15 \\
    --workdir=workdir/scenes_instruct --init_from=scenes

The variant is the time in minutes that all stages may take on two cores (default 15). It scales
only the training steps. The bundled model was trained in two runs from an earlier `scenes`. The
variant `long` trains 12,000 steps from `scenes` on more records, which takes 80 minutes on two idle
cores. The variant `redrawn` then trains 3,000 steps from `long` on other records, which takes 20
minutes. In half of these records, the input image was encoded and decoded by the image tokenizer,
so it looks like a generated image.
"""

import ml_collections

from cm3leon_jax.configs import base, scenes
from cm3leon_jax.runs import from_data

STEPS, LONG_STEPS, REDRAWN_STEPS = 1_600, 12_000, 3_000


def get_config(variant: str = "15") -> ml_collections.ConfigDict:
  scale = base.scale_of(variant, "scenes_instruct", ("long", "redrawn"))
  config = scenes.get_config("long")  # The config of the bundled model.
  config.scenes.update(train=8_000)  # Only replay reads these scenes.
  config.instructions.update(tasks="scenes", loss_on="target", replay_share=0.1)
  # With the instruction after the input image, edits change other objects, too.
  config.instructions.update(instruction_first=True)
  steps = {"long": LONG_STEPS, "redrawn": REDRAWN_STEPS}.get(variant, round(STEPS * scale))
  config.optimizer.update(learning_rate=2.5e-3, warmup_steps=50, ema_decay=0.99)
  # Text is decoded greedily. Edits use almost no guidance.
  config.sampling.update(text_top_k=1, image_guidance=1.0, edit_guidance=1.25)
  config.train.update(steps=max(10, steps), global_batch_size=4, eval_batches=16)
  config.train.update(from_data.intervals(steps))
  if variant in ("long", "redrawn"):
    rate = 2e-3 if variant == "long" else 1e-3
    config.optimizer.update(learning_rate=rate, warmup_steps=100, ema_decay=0.998)
  else:
    config.instructions.update(max_records=3_000)  # A short training does not need more.
  if variant == "redrawn":
    config.scenes.update(seed=1)  # Draws records that `long` has not seen.
    config.instructions.update(max_records=8_000, redrawn=0.5)
  return config

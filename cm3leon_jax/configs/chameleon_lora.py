"""Tunes Chameleon-7B or Anole-7B on your pictures, with low-rank adapters and retrieved documents.

  cm3leon run --config=chameleon_lora --config.raw.source=my_images --workdir=mine \\
    --init_from=W --config.retrieval.clip=clip-vit-base-patch32

W is a workdir in which `cm3leon import_weights --config=chameleon_7b` wrote the weights, and the
CLIP is a folder that you download. The variant is the number of pictures (default 1,000); training
draws each four times, after two others that resemble it. docs/weights.md is the guide.
"""

import ml_collections

from cm3leon_jax.configs import chameleon_7b

ROWS = 8  # A picture and two neighbors, of 1,024 codes each, fill a row.
PASSES = 4


def get_config(variant: str = "1000") -> ml_collections.ConfigDict:
  config = chameleon_7b.get_config()
  config.adapter.rank = 16
  config.raw.update(source="", heldout_fraction=0.05, max_rejected=0.1)
  config.clip.resolution = 224  # The sizes are then those of the published ViT-B/32.
  config.retrieval.clip = "clip-vit-base-patch32"
  config.data.update(text_share=0.0, pack_window=1_024)
  steps = max(10, round(PASSES * int(variant) / ROWS))
  config.train.update(global_batch_size=ROWS, rows_per_device=1, steps=steps, patience=3)
  config.train.update(eval_every=max(5, steps // 10), eval_batches=4, keep_checkpoints=2)
  config.train.update(checkpoint_every=max(5, steps // 10), sample_every=steps)
  config.optimizer.update(learning_rate=2e-4, warmup_steps=steps // 10, weight_decay=0.0)
  return config

"""Trains CM3Leon-350M on images with captions, with a published image tokenizer and CLIP.

  cm3leon import_vqgan --config=published_350m --workdir=W --source=amused-256
  cm3leon run --config=published_350m --workdir=W --config.raw.source=my_images \\
    --config.retrieval.clip=clip-vit-base-patch32

Both models are folders that you download. The image tokenizer is aMUSEd's: an image of 256 x 256
pixels has 256 codes. The variant is the number of images, in millions, that the training reads
(default 10). Images that it reads more than once count each time; their neighbors do not count.
The sizes suit one accelerator machine or a small slice. docs/weights.md is the guide.
"""

import ml_collections

from cm3leon_jax.configs import cm3leon_350m

ROWS = 256  # 1M tokens per step.
CAPTION_TOKENS = 26  # Tokens of a caption (24, an estimate), and of <break> after each part.


def get_config(variant: str = "10") -> ml_collections.ConfigDict:
  config = cm3leon_350m.get_config()
  config.raw.update(resolution=256, jpeg_quality=95, heldout_fraction=0.01)
  config.vqgan.published = "amused"
  config.clip.resolution = 224  # The sizes are then those of the published ViT-B/32.
  config.retrieval.clip = "clip-vit-base-patch32"
  config.data.text_share = 0.0
  config.train.update(global_batch_size=ROWS, steps=_steps(variant, config))
  # The learning rate of OPT-350M (Zhang et al. 2022, table 1), whose batch is half as large.
  config.optimizer.update(learning_rate=3e-4, warmup_steps=min(1_500, config.train.steps // 10))
  return config


def _steps(variant: str, config: ml_collections.ConfigDict) -> int:
  """Returns the steps that read the number of images, in millions, that the variant names."""
  codes = (config.vqgan.resolution // config.vqgan.downsample) ** 2
  sample = (codes + CAPTION_TOKENS) * (1 + config.data.num_neighbors)
  return max(1, round(1e6 * float(variant) * sample / (ROWS * config.data.sequence_length)))

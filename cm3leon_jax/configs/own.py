"""Trains every stage on a folder of your own images and captions, on two CPU cores in minutes.

  cm3leon run --config=own --config.raw.source=my_images --workdir=W
  cm3leon run --config=own:60 --config.raw.source=my_images --workdir=W
  cm3leon run --config=own:10 --config.raw.source=my_images --workdir=W --init_from=scenes
  cm3leon run --config=own --config.raw.source=my_images --workdir=W --init_from=none

The variant is the time in minutes that all stages may take on two cores (default 15). Fields that
are None here are computed from the counts of `cm3leon prepare_data`: resolution, size of the text
vocabulary, length of rows, share of texts, batch sizes and steps. docs/own_images.md walks through
a run. The run tunes a base, and has its model and tokenizers (docs/tuning.md): the bundle
`illustrations`, or what --init_from names. With none, it trains the model below from random
parameters; a config of yours with another model sets `train.base` to "".
"""

import ml_collections
from ml_collections import config_dict

from cm3leon_jax.configs import defaults

FOLLOW = {
  int: (
    *("vocab.text_size", "vqgan.resolution", "vqgan.batch_size", "vqgan.steps"),
    *("clip.resolution", "clip.batch_size", "clip.steps"),
    *("train.steps", "train.checkpoint_every", "train.eval_every", "train.sample_every"),
    *("data.base_documents", "train.patience", "data.sequence_length", "model.max_positions"),
  ),
  float: ("data.text_share", "data.base_share"),
}


def get_config(variant: str = "15") -> ml_collections.ConfigDict:
  config = defaults.small_config()
  config.train.minutes = 15 * defaults.scale_of(variant, named=())
  config.train.base = "illustrations"
  # `max_rejected` is high, because a few damaged files are a large share of 300 images.
  config.raw.update(source="", resolution=0, heldout_fraction=0.07, max_rejected=0.1)
  config.raw.crops = -1  # Adds random crops, because a model soon overfits a few hundred images.
  config.vocab.image_size = 2_048
  config.vqgan.update(source="pictures", learning_rate=5e-3)
  config.clip.shift = 0.1
  config.optimizer.learning_rate = 2e-3
  # With temperature 0.2 and guidance 1, most samples are blank (docs/own_images.md).
  config.sampling.update(temperature=0.7, guidance=3.0)
  config.train.update(global_batch_size=3, eval_batches=8)
  for kind, names in FOLLOW.items():
    for name in names:
      section, field = name.split(".")
      del config[section][field]
      config[section][field] = config_dict.placeholder(kind)
  return config

"""Trains the image tokenizer `pictures` for any image; one core takes about an hour.

  cm3leon prepare_data --config=examples/pictures/config.py --workdir=workdir/pictures
  cm3leon train_vqgan --config=examples/pictures/config.py --workdir=workdir/pictures

The records are those of `make_data.py`. README.md explains the choices.
"""

import ml_collections

from cm3leon_jax.configs import defaults

MINUTES = 70  # Of one core.
STEPS = 11_000  # Steps that fit in this time.


def get_config(variant: str = str(MINUTES)) -> ml_collections.ConfigDict:
  """Returns the config; the variant is the time in minutes of one core."""
  config = defaults.small_config()
  config.vocab.image_size = 2_048
  config.raw.update(source="pictures_data", resolution=64)
  # Values are normalized per position, so that the network does not depend on the resolution.
  config.vqgan.update(resolution=64, downsample=4, stem=4, local_codes=True, width=128)
  config.vqgan.update(decoder_blocks=(3,), code_dim=8, l1_weight=0.1, learning_rate=2e-3)
  config.vqgan.update(batch_size=16, restart_every=100, ema_decay=0.999, warmup_steps=100)
  config.vqgan.update(steps=round(STEPS * float(variant) / MINUTES), checkpoint_every=500)
  config.train.tensorboard = False
  return config

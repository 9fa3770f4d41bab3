"""Configures an image tokenizer and CLIP that train in seconds, for tests that stop them."""

from tests.generation.run import make_config

STEPS = 1_000


def get_config():
  config = make_config()
  training = {"steps": STEPS, "batch_size": 8, "learning_rate": 3e-3}
  config.vqgan.update({**training, "checkpoint_every": STEPS // 2})
  config.clip.update({**training, "checkpoint_every": STEPS // 2})
  return config

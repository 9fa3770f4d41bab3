"""Defines the decoder of Chameleon-7B and Anole-7B, for their published weights.

  cm3leon import_weights --config=chameleon_7b --workdir=W --source=FOLDER
  cm3leon generate --workdir=W --prompt="a red house by a lake"

FOLDER is in the layout of transformers; docs/weights.md is the guide. Images have 512 x 512 pixels
and 1,024 codes. Sampling is Meta's default: temperature 0.7, top-p 0.9 and guidance 3.
"""

import ml_collections

from cm3leon_jax.configs import defaults


def get_config() -> ml_collections.ConfigDict:
  config = defaults.get_config()
  config.vocab.update(template="chameleon", text_size=57_344, image_size=8_192)
  config.model.update(family="chameleon", num_layers=32, width=4_096, num_heads=32)
  config.model.update(mlp_width=11_008)
  config.raw.update(resolution=512, jpeg_quality=95)
  config.vqgan.update(resolution=512, published="chameleon")
  config.sampling.update(temperature=0.7, top_p=0.9, top_k=0, guidance=3.0)
  return config

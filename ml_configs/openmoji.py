"""The demo: 4,000 captioned drawings and some text, every stage from raw pairs to a report on two CPU cores.

  bash launch/demo.sh
  python -m launch.train --config=ml_configs/openmoji.py:15 --workdir=workdir

The variant is the number of minutes that the whole demo may take on two cores (default 15), or `long`.
It scales the steps of the training stages and nothing else.
"""

from ml_configs import base

VOCAB = {"num_special": 32, "text_size": 2_048, "image_size": 512}


def get_config(variant: str = "15"):
  scale = 40.0 if variant == "long" else float(variant) / 15
  steps = lambda n: max(10, round(n * scale))
  config = base.get_config()
  config.vocab.update(VOCAB)
  config.raw.update({"source": "openmoji", "resolution": 64})
  config.vqgan.update({"resolution": 64, "downsample": 4, "width": 64, "code_dim": 8, "steps": steps(1_000)})
  config.clip.update({"steps": steps(300)})
  config.model.update({"vocab_size": 2_560})
  return config

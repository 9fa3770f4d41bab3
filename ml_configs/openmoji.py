"""The demo: 4,000 captioned drawings and some text, every stage from raw pairs to a report on two CPU cores.

  bash launch/demo.sh
  python -m launch.train --config=ml_configs/openmoji.py:15 --workdir=workdir

The variant is the number of minutes that the demo may take on two cores (default 15), or `long`: hours on a CPU,
minutes on a GPU. It scales the steps of the training stages and nothing else.
"""

from cm3leon_jax.config import UserError
from ml_configs import base

LONG = 10.0


def get_config(variant: str = "15"):
  try:
    scale = LONG if variant == "long" else float(variant) / 15
  except ValueError:
    scale = 0.0
  if scale <= 0:
    raise UserError(f"config variant '{variant}' of openmoji.py must be a positive number of minutes, or 'long'.")
  steps = lambda n, most: max(10, round(n * min(scale, most)))
  config = base.get_config()
  config.vocab.update({"num_special": 32, "text_size": 2_048, "image_size": 512})
  config.raw.update({"source": "openmoji", "resolution": 64})
  config.vqgan.update({"resolution": 64, "downsample": 4, "stem": 2, "width": 64, "multipliers": (1, 1)})
  config.vqgan.update({"encoder_blocks": (1, 1), "decoder_blocks": (1, 2), "code_dim": 8, "batch_size": 8})
  config.vqgan.update({"learning_rate": 2e-3, "warmup_steps": 50, "adversarial_weight": 0.0, "checkpoint_every": 100})
  config.vqgan.update({"steps": steps(1_500, 4)})
  config.clip.update({"steps": steps(280, 4)})
  config.retrieval.update({"max_similarity": 0.97})  # A small CLIP's similarities run high; 0.9 rejects 9 of 10.
  config.data.update({"sequence_length": 1_024, "text_share": 0.15, "pack_window": 1_024})
  config.model.update({"vocab_size": 2_560, "num_layers": 4, "width": 256, "num_heads": 4, "mlp_width": 1_024})
  config.model.update({"max_positions": 1_024, "dtype": "float32", "remat_policy": "none", "loss_chunk": 1_024})
  config.optimizer.update({"learning_rate": 2e-3, "warmup_steps": 40, "weight_decay": 0.05})
  config.train.update({"steps": steps(330, 1e9), "global_batch_size": 4, "eval_batches": 8})
  config.train.update(
    {"checkpoint_every": min(100, max(5, config.train.steps // 12)), "eval_every": max(5, config.train.steps // 8)}
  )
  config.train.update({"sample_every": max(5, config.train.steps // 3)})
  return config

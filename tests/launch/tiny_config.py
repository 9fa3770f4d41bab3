"""Configures a training that takes seconds: --config=tests/launch/tiny_config.py."""

import dataclasses

from cm3leon_jax.config.settings import default_config
from tests.data.stores import VOCAB


def get_config():
  config = default_config()
  config.vocab.update(dataclasses.asdict(VOCAB))
  config.vqgan.update(
    {"resolution": 8, "downsample": 2, "stem": 2, "width": 8, "multipliers": (1,)}
  )
  config.vqgan.update(
    {"encoder_blocks": (0,), "decoder_blocks": (0,), "code_dim": 4, "adversarial_weight": 0.0}
  )
  config.data.update({"sequence_length": 64, "pack_window": 64, "text_share": 0.3})
  config.model.update(
    {"vocab_size": VOCAB.size, "num_layers": 1, "width": 32, "num_heads": 4, "mlp_width": 64}
  )
  config.model.update({"max_positions": 64, "dtype": "float32", "init_std": 0.1})
  config.optimizer.update({"learning_rate": 1e-2, "ema_decay": 0.9})
  config.train.update(
    {"steps": 12, "global_batch_size": 8, "eval_every": 6, "eval_batches": 1, "checkpoint_every": 4}
  )
  config.train.update({"sample_every": 4, "num_samples": 3})
  return config

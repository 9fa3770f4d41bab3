"""Configures a VQGAN that compiles in seconds: one level, no residual blocks, 4 x 4-pixel codes."""

import numpy as np

from cm3leon_jax.config.tokenizers import VQGANConfig


def tiny_config(**fields) -> VQGANConfig:
  sizes = {"resolution": 8, "downsample": 4, "stem": 4, "width": 8, "multipliers": (1,)}
  sizes |= {"encoder_blocks": (0,), "decoder_blocks": (0,), "code_dim": 4}
  training = {"batch_size": 4, "warmup_steps": 0, "adversarial_weight": 0.0}
  return VQGANConfig(**{**sizes, **training, **fields})


def random_images(count: int = 4) -> np.ndarray:
  return np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3)).astype(np.uint8)

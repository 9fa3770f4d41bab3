"""Trains all models on 4,096 captioned OpenMoji drawings and some text, on two CPU cores.

  python examples/openmoji/make_data.py openmoji_data
  cm3leon run --config=examples/openmoji/config.py --workdir=workdir/openmoji

The number after the colon (config.py:30) is the time in minutes for all stages on two cores
(default 15). It scales only the numbers of training steps. The variant `long` trains a larger
decoder, for hours on two cores or minutes on a GPU. It uses the tokenizers, CLIP and neighbors of a
finished short run. README.md explains the choices.
"""

import ml_collections

from cm3leon_jax.configs import base

STEPS = {"vqgan": 1_200, "clip": 250, "train": 1_100}  # Steps that fit in 15 minutes.
LONG_STEPS = 2_000


def get_config(variant: str = "15") -> ml_collections.ConfigDict:
  scale = base.scale_of(variant)
  steps = {stage: max(10, round(n * scale)) for stage, n in STEPS.items()}
  config = base.get_config()
  config.vocab.update(num_special=32, text_size=2_048, image_size=512)
  # Records state their split. To use another folder: --config.raw.source=FOLDER.
  config.raw.update(source="openmoji_data", resolution=64)
  config.vqgan.update(resolution=64, downsample=4, stem=2, width=64, multipliers=(1, 1))
  config.vqgan.update(encoder_blocks=(1, 1), decoder_blocks=(1, 2), code_dim=8, batch_size=8)
  config.vqgan.update(
    learning_rate=2e-3, warmup_steps=50, adversarial_weight=0.0, checkpoint_every=100
  )
  config.vqgan.update(steps=steps["vqgan"])
  config.clip.update(resolution=64, image_encoder="conv", patch=4, image_width=128, image_layers=1)
  config.clip.update(text_width=128, text_layers=2, text_length=24, embed_dim=128, batch_size=128)
  config.clip.update(learning_rate=1e-3, warmup_fraction=0.05, weight_decay=0.1, text_dropout=0.1)
  config.clip.update(shift=0.1, color_jitter=0.0, checkpoint_every=100, steps=steps["clip"])
  # The small CLIP gives high similarities: the paper's limit, 0.9, would reject 9 of 10 neighbors.
  config.retrieval.update(max_similarity=0.97)
  config.data.update(sequence_length=1_024, text_share=0.15, interleaved_share=0.05)
  config.data.update(pack_window=1_024)
  config.model.update(family="modern", num_layers=4, width=128, num_heads=2)
  config.model.update(mlp_width=384, max_positions=1_024, init_std=0.034, embed_std=0.25)
  config.model.update(dtype="float32", remat_policy="none", loss_chunk=1_024)
  config.optimizer.update(learning_rate=5e-3, warmup_steps=30, weight_decay=0.05)
  config.train.update(steps=steps["train"], global_batch_size=2, eval_batches=16, log_every=10)
  config.train.update(checkpoint_every=min(100, max(5, config.train.steps // 12)))
  config.train.update(eval_every=max(5, config.train.steps // 8))
  config.train.update(sample_every=max(5, config.train.steps // 3))
  if variant == "long":
    config.model.update(width=192, num_heads=3, mlp_width=512)
    config.optimizer.update(learning_rate=4e-3, warmup_steps=100, weight_decay=0.1)
    config.train.update(steps=LONG_STEPS, global_batch_size=4, eval_batches=8)
    config.train.update(checkpoint_every=200, eval_every=200, sample_every=1_000)
  return config

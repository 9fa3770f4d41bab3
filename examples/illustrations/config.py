"""Trains a model of drawings by six artists, on one CPU core.

  python examples/illustrations/make_data.py illustrations_data --packages=packages
  cm3leon run --config=examples/illustrations/config.py --workdir=workdir/illustrations
  cm3leon run --config=examples/illustrations/config.py:30 --workdir=workdir/illustrations_30

The variant is the time in minutes that all stages may take on one core (default 150). It scales the
steps. From `LARGE` minutes on, images have 48 pixels and 144 codes, and the decoder has 2.5 million
parameters; below, 32 pixels, 64 codes and 1.5 million. For another folder of records:
--config.raw.source=FOLDER. docs/illustrations.md describes the recipe and its evaluation.
"""

import ml_collections

from cm3leon_jax.configs import defaults
from cm3leon_jax.stages import from_data

LARGE = 60
CLIP_STEPS = 400  # At most; it then has seen each drawing nine times.
# Decoder steps per minute of all stages on one core, see the table of throughput in docs/log.md.
STEPS = {48: 50, 32: 90}


def get_config(variant: str = "150") -> ml_collections.ConfigDict:
  minutes = 15 * defaults.scale_of(variant, named=())
  side = 48 if minutes >= LARGE else 32
  config = defaults.small_config()
  # Without the crops, the held-out loss rises after five passes over the drawings (docs/log.md).
  config.raw.update(source="illustrations_data", resolution=side, crops=2)
  config.vocab.update(text_size=512, image_size=2_048)
  config.vqgan.update(source="pictures", resolution=side)
  config.clip.update(resolution=side, batch_size=128, shift=0.1)
  config.clip.steps = max(10, min(CLIP_STEPS, round(10 * minutes)))
  # The best document by the caption precedes a drawing, as at inference. As in the paper, queries
  # of training lose words. The paper's `max_similarity`, 0.9, is for CLIP alone: with
  # `lexical_weight`, it would reject most documents of the same concept.
  config.retrieval.update(backend="auto", query_dropout=0.2)
  config.data.text_share = 0.0
  # All pairs fit into a row with one neighbor.
  length = 352 if side == 48 else 192
  config.data.sequence_length = config.model.max_positions = length
  config.optimizer.update(learning_rate=2e-3, warmup_steps=100, ema_decay=0.998)
  if side == 48:
    config.model.update(width=192, num_heads=3, mlp_width=384)
  config.sampling.update(temperature=0.9, guidance=3.0)
  config.evaluation.update(num_documents=750, batch_size=32)
  config.train.update(global_batch_size=8 if side == 48 else 16, eval_batches=16, patience=3)
  config.train.steps = max(10, round(STEPS[side] * minutes))
  config.train.update(from_data.intervals(config.train.steps))
  return config

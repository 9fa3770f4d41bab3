"""Defines the config values that the three CM3Leon sizes share, and those that the demos share.

The default variant has the values of the tutorial that this project started from. The variant
`:paper` has the paper's values. The stages `vqgan` and `clip` of these sizes train on one host.
`cm3leon plan` prints how long they take. A published image tokenizer (`cm3leon import_vqgan
--source=FOLDER`) and a published CLIP (`--config.retrieval.clip=FOLDER`) need no training.
docs/scaling.md lists the steps, and docs/config.md every field.
"""

from collections.abc import Sequence

import ml_collections

from cm3leon_jax.config.settings import default_config
from cm3leon_jax.errors import UserError


def get_config(
  variant: str = "", learning_rate: float = 1e-4, tokens: float = 1.4e12
) -> ml_collections.ConfigDict:
  """Returns the shared config.

  Args:
    variant: "" or "paper".
    learning_rate: learning rate of the paper for this size; only "paper" uses it.
    tokens: number of training tokens of the paper for this size; only "paper" uses it.
  """
  config = default_config()
  config.vocab.update(num_special=256, text_size=56_320, image_size=8_192)
  config.model.max_positions = 4_096
  # 256 codes per image.
  config.vqgan.update(resolution=256, downsample=16, multipliers=(1, 1, 2, 4))
  config.vqgan.update(encoder_blocks=(2, 2, 2, 2), decoder_blocks=(3, 3, 3, 3))
  config.optimizer.update(learning_rate=1e-4, warmup_steps=1_500, schedule="cosine")
  config.data.update(sequence_length=4_096, num_neighbors=2, condition_dropout=0.1, text_share=0.7)
  # The paper always retrieves. Here every tenth sample has no neighbors, so that the model also
  # learns to draw an image directly after `</s> caption <break>`, a prompt without retrieval.
  config.data.update(neighbor_dropout=0.1)
  config.train.update(global_batch_size=8_192, steps=41_723)  # 1.4T tokens, 33.6M per step.
  if variant == "paper":
    config.vqgan.update(downsample=8, multipliers=(1, 2, 4))  # 1,024 codes per image.
    config.vqgan.update(encoder_blocks=(2, 2, 2), decoder_blocks=(3, 3, 3))
    # Three neighbors and the query document have 1,024 codes each and never fit in 4,096 positions.
    # So two neighbors remain. Every sample has neighbors, because the loss on the first neighbor
    # already trains the model to draw an image directly after `</s> caption <break>`.
    config.data.update(neighbor_sampling="paper", num_neighbors=3, neighbor_dropout=0.0)
    config.data.update(condition_dropout=0.0, text_share=0.0)
    config.optimizer.update(learning_rate=learning_rate, schedule="linear")
    rows = 2_048  # 8M tokens per step.
    config.train.update(global_batch_size=rows, steps=round(tokens / (rows * 4_096)))
  elif variant:
    raise UserError(f"config variant '{variant}' does not exist; it must be empty or 'paper'.")
  return config


def small_config() -> ml_collections.ConfigDict:
  """Returns the config that the demos share, which train on two CPU cores in minutes."""
  config = get_config()
  config.vocab.num_special = 32
  # A code represents a square of 4 x 4 pixels, and depends only on these pixels.
  config.vqgan.update(downsample=4, stem=4, local_codes=True, width=64, code_dim=8)
  config.vqgan.update(multipliers=(1,), encoder_blocks=(1,), decoder_blocks=(2,), l1_weight=0.1)
  config.vqgan.update(warmup_steps=50, adversarial_weight=0.0)
  config.vqgan.update(restart_every=50, checkpoint_every=200)
  config.clip.update(image_encoder="conv", patch=4, image_width=128, image_layers=1)
  config.clip.update(text_width=128, text_layers=2, text_length=24, embed_dim=128)
  config.clip.update(learning_rate=1e-3, warmup_fraction=0.05, weight_decay=0.1)
  config.clip.update(text_dropout=0.1, color_jitter=0.0, checkpoint_every=100)
  config.retrieval.update(max_similarity=1.0, backend="exact", query_dropout=0.0)
  # A CLIP that trains for minutes does not learn names, so retrieval also compares words.
  config.retrieval.update(lexical_weight=0.85, lexical_width=512)
  config.data.update(sequence_length=512, pack_window=1_024)
  # `code_dropout` hides codes from the input, so that the decoder learns to copy from the neighbor.
  config.data.update(num_neighbors=1, neighbor_sampling="best", neighbor_dropout=0.1)
  config.data.update(neighbor_loss_weight=0.1, code_dropout=0.6)
  config.data.mean_spans = 0.3  # In a short training, captions matter more than infilling.
  config.model.update(family="modern", num_layers=4, width=128, num_heads=2, mlp_width=352)
  config.model.update(max_positions=512, init_std=0.034, embed_std=0.25, dtype="float32")
  config.model.update(remat_policy="none", loss_chunk=512, unroll_layers=True)
  # `align_images` gives the images of neighbor and document the same positions. `codebook_start`
  # gives codes that look alike similar embeddings from the start.
  config.model.update(align_images=True, codebook_start=0.5, tied_start=True)
  config.optimizer.update(name="muon", warmup_steps=50, weight_decay=0.05, ema_decay=0.99)
  config.train.update(global_batch_size=2, log_every=50)
  return config


def instruction_tuning(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """Converts a pretraining config to one for instruction tuning (CM3Leon, section 4, appendix E).

  The model, vocab and tokenizers do not change, so that `--init_from` accepts the pretrained
  parameters.
  """
  config.instructions.update(tasks="cm3leon", loss_on="all")
  config.optimizer.update(learning_rate=5e-5, warmup_steps=150)
  # 2M tokens per step, 30B tokens in total.
  config.train.update(global_batch_size=512, steps=14_305)
  config.train.update(rows_per_device=2)  # With 256 devices, no gradient accumulation is needed.
  return config


def scale_of(variant: str, named: Sequence[str] = ("long",)) -> float:
  """Returns the factor by which a variant scales the steps of a 15-minute demo.

  The factor is minutes / 15, or 1 for a variant in `named`; `variant` is a number of minutes or a
  name.
  """
  return 1.0 if variant in named else float(variant) / 15

"""What CM3Leon's three sizes share: the tutorial's numbers, or with `:paper` the paper's where the two differ.

Every field and its meaning: docs/config.md.
"""

import ml_collections

from cm3leon_jax.config import UserError
from cm3leon_jax.settings import default_config


def get_config(
  variant: str = "", learning_rate: float = 1e-4, tokens: float = 1.4e12
) -> ml_collections.ConfigDict:
  """Args: variant `` or `paper`; the paper's learning rate and number of tokens of this size."""
  config = default_config()
  config.vocab.update({"num_special": 256, "text_size": 56_320, "image_size": 8_192})
  config.model.update({"vocab_size": 64_512, "max_positions": 4_096})
  config.vqgan.update(
    {"resolution": 256, "downsample": 16, "multipliers": (1, 1, 2, 4)}
  )  # 256 codes an image.
  config.vqgan.update({"encoder_blocks": (2, 2, 2, 2), "decoder_blocks": (3, 3, 3, 3)})
  config.optimizer.update({"learning_rate": 1e-4, "warmup_steps": 1_500, "schedule": "cosine"})
  config.data.update(
    {"sequence_length": 4_096, "num_neighbors": 2, "condition_dropout": 0.1, "text_share": 0.7}
  )
  # The paper always retrieves. Here every tenth sample has no neighbors: a prompt without a bank is
  # then `</s> caption <break>` before the document itself, not only before a first neighbor.
  config.data.update({"neighbor_dropout": 0.1})
  config.train.update({"global_batch_size": 8_192, "steps": 41_723})  # 1.4T tokens, 33.6M a step.
  if variant == "paper":
    config.vqgan.update({"downsample": 8, "multipliers": (1, 2, 4)})  # 1,024 codes an image.
    config.vqgan.update({"encoder_blocks": (2, 2, 2), "decoder_blocks": (3, 3, 3)})
    # Three of 1,024 codes and the query never fit 4,096, so two remain: training says so. None is
    # dropped: the first neighbor, scored in full, already teaches to go on from `</s>` alone.
    config.data.update(
      {
        "neighbor_sampling": "paper",
        "num_neighbors": 3,
        "neighbor_dropout": 0.0,
        "condition_dropout": 0.0,
        "text_share": 0.0,
      }
    )
    config.optimizer.update({"learning_rate": learning_rate, "schedule": "linear"})
    rows = 2_048  # 8M tokens a step.
    config.train.update({"global_batch_size": rows, "steps": round(tokens / (rows * 4_096))})
  elif variant:
    raise UserError(f"config variant '{variant}' does not exist: it is empty or 'paper'.")
  return config

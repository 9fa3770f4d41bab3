"""Demo config: learns small scenes on two CPU cores in minutes. Its images are graded exactly.

  bash launch/demo.sh
  cm3leon train --config=scenes:15 --workdir=workdir/scenes

The variant is the time in minutes that all stages may take on two cores (default 15). It scales
only the steps of the training stages. The variant `long` is the recipe of the bundled model, with
more scenes and a larger decoder. docs/design.md explains the choices. docs/retrieval_ablation.md
explains the choices that make a small decoder copy from its neighbors.
"""

import ml_collections

from cm3leon_jax.configs import base

STEPS = {"vqgan": 2_000, "clip": 200, "train": 3_200}  # Steps that fit in 15 minutes.
LONG_STEPS = {"vqgan": 6_000, "clip": 250, "train": 4_000}


def get_config(variant: str = "15") -> ml_collections.ConfigDict:
  scale = base.scale_of(variant, "scenes")
  steps = (
    LONG_STEPS
    if variant == "long"
    else {stage: max(10, round(n * scale)) for stage, n in STEPS.items()}
  )
  config = base.get_config()
  _set_world(config)
  _set_encoders(config)
  _set_decoder(config)
  for stage, count in steps.items():
    config[stage].steps = count
  config.train.update({"global_batch_size": 2, "eval_batches": 32, "log_every": 50})
  config.train.update({"checkpoint_every": min(400, max(5, config.train.steps // 12))})
  config.train.update({"eval_every": max(5, config.train.steps // 8)})
  config.train.update({"sample_every": max(5, config.train.steps // 3)})
  if variant == "long":
    _lengthen(config)
  return config


def _set_world(config: ml_collections.ConfigDict) -> None:
  config.vocab.update({"num_special": 32, "text_size": 1_024, "image_size": 1_024})
  # Colors are learned last, and the colors of two objects even later. Captions that name colors are
  # therefore more frequent than other captions.
  config.scenes.update({"train": 16_000, "shares": (1.0, 2.0, 1.0, 1.0, 2.0, 3.0, 3.0)})
  # The bank has each rare training object once, at the same place in another color. It has common
  # objects and held-out objects at all four places. Training scenes are not searched, because a
  # scene with the right object and color at a wrong place would be nearer to a caption than a
  # document of the bank with the object at the right place.
  config.scenes.update({"rare_objects": 1_550, "bank": 2_673})
  config.raw.update({"source": "scenes", "resolution": 48})


def _set_encoders(config: ml_collections.ConfigDict) -> None:
  # A code stands for a square of 6 x 6 pixels. An icon has the same 4 x 4 codes at every place.
  config.vqgan.update({"resolution": 48, "downsample": 6, "stem": 6, "local_codes": True})
  config.vqgan.update({"width": 64, "multipliers": (1,), "encoder_blocks": (1,)})
  config.vqgan.update({"decoder_blocks": (2,), "code_dim": 8, "batch_size": 16})
  config.vqgan.update({"learning_rate": 0.012, "l1_weight": 0.1, "warmup_steps": 50})
  config.vqgan.update({"adversarial_weight": 0.0})
  config.vqgan.update({"restart_every": 50, "checkpoint_every": 200})
  config.clip.update({"resolution": 48, "image_encoder": "conv", "patch": 4, "image_width": 128})
  config.clip.update({"image_layers": 1, "text_width": 128, "text_layers": 2, "text_length": 24})
  config.clip.update({"embed_dim": 128, "batch_size": 128, "learning_rate": 1e-3})
  config.clip.update({"warmup_fraction": 0.05, "weight_decay": 0.1, "text_dropout": 0.1})
  config.clip.update({"shift": 0.0, "color_jitter": 0.0, "checkpoint_every": 100})
  # A CLIP that trains for minutes does not learn names, so retrieval compares words, too.
  config.retrieval.update({"lexical_weight": 0.85, "lexical_width": 512, "max_similarity": 1.0})
  # Each document of the bank shows a single object at a place. No document helps a caption with
  # several objects or without a place. This threshold leaves such captions without neighbors, and
  # also some captions of a common object with a color.
  config.retrieval.update({"min_similarity": 0.58})
  config.retrieval.update({"query_dropout": 0.0, "backend": "exact", "train_documents": False})


def _set_decoder(config: ml_collections.ConfigDict) -> None:
  config.data.update({"sequence_length": 512, "text_share": 0.0, "pack_window": 1_024})
  config.data.update({"num_neighbors": 1, "neighbor_sampling": "best", "neighbor_dropout": 0.1})
  config.data.update({"neighbor_loss_weight": 0.1, "code_dropout": 0.6})
  # A short training should first learn captions, then infilling.
  config.data.update({"mean_spans": 0.3})
  config.model.update({"family": "modern", "num_layers": 4, "width": 128})
  config.model.update({"num_heads": 2, "mlp_width": 352, "max_positions": 512})
  config.model.update({"init_std": 0.034, "embed_std": 0.25})
  config.model.update({"dtype": "float32", "remat_policy": "none", "loss_chunk": 512})
  config.model.update({"unroll_layers": True})
  # `align_images` gives a neighbor's image the same positions. `codebook_start` gives codes of one
  # shape in two colors similar embeddings from the start.
  config.model.update({"align_images": True, "codebook_start": 0.5, "tied_start": True})
  config.optimizer.update(
    {"name": "muon", "learning_rate": 3e-3, "warmup_steps": 50, "weight_decay": 0.05}
  )
  config.optimizer.update({"ema_decay": 0.99})
  # Few of the 1,024 codes are likely. With `contrastive_k` = 16, all codes would be allowed.
  config.sampling.update({"temperature": 0.5, "guidance": 1.25, "contrastive_k": 1})
  config.evaluation.update({"scenes": 240, "scene_guidance": (1.0, 1.25), "scene_neighbors": 1})


def _lengthen(config: ml_collections.ConfigDict) -> None:
  config.scenes.update({"train": 80_000})
  config.vqgan.update({"learning_rate": 5e-3, "l1_weight": 0.5})  # The values of the bundled model.
  config.model.update({"width": 192, "num_heads": 3, "mlp_width": 448})
  config.optimizer.update({"learning_rate": 2e-3, "warmup_steps": 100, "ema_decay": 0.998})
  config.evaluation.update({"scenes": 600, "scene_guidance": (1.0, 1.25, 1.5, 2.0)})
  config.train.update({"global_batch_size": 4, "eval_batches": 16})

"""Configures runs of 20 steps for `benchmarks.golden`: --config=golden_config.py:VARIANT.

`opt` trains the family `opt` on scenes, with a neighbor before each pair. `modern` trains on pairs,
texts and interleaved documents from a folder, in bfloat16 on eight devices, with every optional
part of a training step. `tuned` is instruction tuning, starting from `modern`. `rewards` is
reinforcement learning from the lightness of images, since a judge finds no image of such models
correct.
"""

from cm3leon_jax.configs import base

VARIANTS = ("opt", "modern", "tuned", "rewards")


def get_config(variant: str = "opt"):
  config = base.get_config()
  _set_encoders(config)
  _set_decoder(config)
  if variant == "opt":
    if "max_texts" in config.raw:  # Commits with this field add docstrings of packages as texts.
      config.raw.max_texts = 0
    _add_scenes(config)
    config.model.activation = "gelu_tanh"
    config.data.update({"text_share": 0.0, "num_neighbors": 1, "neighbor_sampling": "best"})
  else:
    config.raw.update({"source": "data", "default_license": "CC0-1.0", "heldout_fraction": 0.3})
    _switch_on(config)
  if variant in ("tuned", "rewards"):
    config.mesh.update({"data": 1, "fsdp": -1, "tensor": 1})
    # Commits whose package draws the records have the section `scenes`.
    tasks = "scenes" if "scenes" in config else "instructions/tasks.yaml"
    config.instructions.update({"tasks": tasks, "loss_on": "target", "max_records": 40})
    config.instructions.update({"replay_share": 0.2, "redrawn": 0.5})
  if variant == "rewards":
    config.optimizer.update({"name": "adamw", "learning_rate": 3e-4})
    config.train.update({"replay_every": 0, "gradient_accumulation_steps": 1})
    config.instructions.update({"replay_share": 0.0})
    config.reinforce.update({"tasks": ("draw",), "samples": 4, "heldout_prompts": 4})
    config.reinforce.reward = "golden_config.py:lightness"
  return config


def lightness(prompts, images, records):
  """Rewards each image with the mean of its pixels, from 0 to 1."""
  del prompts, records
  return images.mean((1, 2, 3)) / 255


def _add_scenes(config):
  sizes = {"train": 200, "heldout": 42, "bank": 40, "rare_objects": 40}
  if "scenes" in config:  # The package of an older commit draws the scenes.
    config.raw.source = "scenes"
    config.scenes.update(sizes)
    config.evaluation.scenes = 7
    return
  from examples.scenes import source
  from examples.scenes.judge import answers

  config.raw.source = f"{source.__file__}:records"
  config.raw.options = sizes
  config.evaluation.update({"judge": f"{answers.__file__}:mistakes", "captions": 7})


def _set_encoders(config):
  config.vocab.update({"num_special": 32, "text_size": 352, "image_size": 64})
  config.raw.update({"resolution": 48})
  config.vqgan.update({"resolution": 48, "downsample": 6, "stem": 6, "local_codes": True})
  config.vqgan.update({"width": 16, "multipliers": (1,), "encoder_blocks": (1,), "steps": 40})
  config.vqgan.update({"decoder_blocks": (1,), "code_dim": 8, "batch_size": 8, "warmup_steps": 5})
  config.vqgan.update({"learning_rate": 0.01, "adversarial_weight": 0.0, "checkpoint_every": 20})
  config.vqgan.update({"restart_every": 10})
  config.clip.update({"resolution": 48, "image_encoder": "conv", "patch": 4, "image_width": 64})
  config.clip.update({"image_layers": 1, "text_width": 64, "text_layers": 1, "text_length": 24})
  config.clip.update({"embed_dim": 32, "batch_size": 16, "steps": 20, "checkpoint_every": 10})
  config.retrieval.update({"backend": "exact", "max_similarity": 1.0, "lexical_weight": 0.5})
  config.retrieval.update({"lexical_width": 64})


def _set_decoder(config):
  config.data.update({"sequence_length": 256, "pack_window": 64})
  config.model.update({"num_layers": 2, "width": 32, "num_heads": 2, "mlp_width": 64})
  config.model.update({"max_positions": 256, "dtype": "float32", "remat_policy": "none"})
  config.model.update({"init_std": 0.05, "embed_std": 0.05, "loss_chunk": 64})
  config.optimizer.update({"learning_rate": 3e-3, "warmup_steps": 5})
  config.train.update({"steps": 20, "global_batch_size": 8, "eval_every": 10, "eval_batches": 2})
  config.train.update({"checkpoint_every": 10, "sample_every": 20, "num_samples": 2})
  config.train.update({"tensorboard": False})
  config.evaluation.update({"num_documents": 8, "num_resamples": 100})


def _switch_on(config):
  config.mesh.update({"data": 2, "fsdp": 2, "tensor": 2})
  config.data.update({"text_share": 0.2, "interleaved_share": 0.2, "num_neighbors": 1})
  config.data.update({"neighbor_sampling": "uniform", "neighbor_loss_weight": 0.5})
  config.data.update({"code_dropout": 0.3, "code_dropout_alone": 0.1, "on_bad_record": "skip"})
  config.model.update({"family": "modern", "query_key_norm": True})
  config.model.update({"tied_start": True, "codebook_start": 0.5, "dtype": "bfloat16"})
  config.model.update({"remat_policy": "save_qkv"})
  config.optimizer.update({"name": "muon", "skip_above": 10.0, "z_loss": 1e-4, "ema_decay": 0.9})
  config.optimizer.update({"first_moment_dtype": "bfloat16", "schedule": "linear"})
  config.train.update({"gradient_accumulation_steps": 2, "replay_every": 10, "keep_every": 10})
  config.train.update({"keep_best": 1})

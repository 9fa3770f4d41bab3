"""Trains a demo on small scenes, on two CPU cores in minutes. Its images are judged exactly.

  bash launch/demo.sh
  cm3leon run --config=examples/scenes/config.py:15 --workdir=workdir/scenes

The variant scales the steps of the training stages; 15 is the default. `bash launch/demo.sh` also
gives --config.train.minutes: `cm3leon run` then measures a step of the decoder and takes as many as
fit. The variant `long` is the recipe of the bundled model, with more scenes and a larger
decoder. docs/design.md explains the choices. docs/log.md explains the choices that make a small
decoder copy from its neighbors.
"""

import dataclasses
import pathlib

import ml_collections

from cm3leon_jax.config.build import build
from cm3leon_jax.config.settings import Settings
from cm3leon_jax.configs import defaults
from cm3leon_jax.stages import from_data
from examples.scenes.options import ScenesConfig

HERE = pathlib.Path(__file__).parent  # Absolute, so that other configs can start from this one.
STEPS = {"clip": 200, "train": 3_400}
LONG_STEPS = {"clip": 250, "train": 7_000}


def get_config(variant: str = "15") -> ml_collections.ConfigDict:
  scale = defaults.scale_of(variant)
  config = defaults.small_config()
  config.vocab.update(text_size=1_024, image_size=2_048)
  config.raw.update(source=f"{HERE}/source.py:records", resolution=48)
  # Scenes of several objects are learned last, copying from a document early (docs/log.md).
  # All options are set, so that flags can override each of them.
  config.raw.options = dataclasses.asdict(ScenesConfig())
  config.raw.options.update(train=16_000, shares=(1.0, 2.0, 2.0, 2.0, 3.0, 4.0, 1.0))
  # The bank has each rare training object once, at the same place in another color. It has common
  # objects and held-out objects at all four places. Training scenes are not searched, because a
  # scene with the correct object and color at a wrong place would be more similar to a caption than
  # a document of the bank with the object at the correct place.
  config.raw.options.update(rare_objects=1_550, bank=2_673)
  config.retrieval.train_documents = False
  # Each document of the bank shows a single object at a place. No document helps a caption with
  # several objects or without a place. With this threshold, such captions get no neighbors. Some
  # captions that name a common object and its color get none either.
  config.retrieval.min_similarity = 0.58
  config.vqgan.update(source="pictures", resolution=48)
  config.clip.update(resolution=48, batch_size=128, shift=0.0)
  config.data.text_share = 0.0
  # Two scenes with their documents, of 144 codes an image, fit into a row.
  config.data.sequence_length = config.model.max_positions = 640
  config.optimizer.learning_rate = 3e-3
  # Only a few of the 2,048 codes are likely. `contrastive_k` = 16 would allow all codes.
  config.sampling.update(temperature=0.5, guidance=1.25, contrastive_k=1)
  config.evaluation.update(judge=f"{HERE}/judge/answers.py:mistakes", neighbors=1)
  config.evaluation.update(captions=240, guidance=(1.0, 1.25))
  for stage, count in STEPS.items():
    config[stage].steps = LONG_STEPS[stage] if variant == "long" else max(10, round(count * scale))
  config.train.update(from_data.intervals(config.train.steps), eval_batches=32, global_batch_size=3)
  if variant == "long":
    _lengthen(config)
  return config


def _lengthen(config: ml_collections.ConfigDict) -> None:
  # With documents at other places, the decoder also learns to copy from them.
  config.raw.options.update(train=80_000, rare_places=4, shares=(1.0, 2.0, 2.0, 2.0, 3.0, 4.0, 2.0))
  config.model.update(width=192, num_heads=3, mlp_width=448)
  config.optimizer.update(learning_rate=2e-3, warmup_steps=100, ema_decay=0.998)
  config.evaluation.update(captions=600, guidance=(1.0, 1.25, 1.5, 2.0))
  config.train.eval_batches = 16


def scenes_of(settings: Settings) -> ScenesConfig:
  """Returns the scenes of a run. Bundles do not store them: theirs are those of variant `long`."""
  options = settings.raw.options or get_config("long").raw.options
  return build(ScenesConfig, options, "raw.options")

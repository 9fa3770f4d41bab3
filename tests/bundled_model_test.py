"""The bundled model of scenes: it is small and whole, and its images show what captions say."""

import numpy as np
import pytest

from cm3leon_jax import CM3Leon
from cm3leon_jax.data import scene_world, scenes
from cm3leon_jax.data.scene_world import Scene, ScenesConfig, split_of_scene
from cm3leon_jax.evaluation.scenes import judge_all
from cm3leon_jax.export import bundle

MOST_BYTES, MOST_OF_A_FILE = 8_000_000, 5_000_000


@pytest.fixture(scope="module")
def heldout():
  """Captions and facts of scenes that are held out, though all their parts are trained."""
  pairs = [scenes.pair(ScenesConfig(), "heldout", i) for i in range(140)]
  pairs = [pair for pair in pairs if pair.facts["heldout"] == "scene"]
  assert len(pairs) >= 32
  return pairs[:32]


def test_it_is_small_and_every_file_is_the_one_that_was_trained():
  folder = bundle.folder_of("scenes")
  bundle.read(folder)
  sizes = [path.stat().length for path in (*folder.glob("*.*"), *folder.glob("*/*"))]
  assert len(sizes) == 15
  assert max(sizes) < MOST_OF_A_FILE
  assert sum(sizes) <= MOST_BYTES


def test_it_says_what_it_cost():
  about = bundle.about(bundle.folder_of("scenes"))
  assert about["bytes"] <= MOST_BYTES
  assert about["cost"].keys() == {"train_seconds", "other_seconds", "machine"}
  assert about["cost"]["train_seconds"] > 600


def test_it_never_trained_on_what_other_runs_of_scenes_hold_out():
  settings, _ = bundle.read(bundle.folder_of("scenes"))
  trained = [scenes.pair(settings.scenes, "train", i).image for i in range(1_000)]
  assert {split_of_scene(Scene.parse(image)) for image in trained} == {"train"}
  others = (
    ScenesConfig(),
    ScenesConfig(seed=7, objects=tuple(scene_world.COMMON)[:20], rare_objects=300),
  )
  for config in others:
    heldout = [scenes.pair(config, "heldout", i).image for i in range(140)]
    assert {split_of_scene(Scene.parse(image)) for image in heldout} == set(scene_world.KINDS)


@pytest.mark.usefixtures("optimized")
def test_its_images_show_what_held_out_captions_say(heldout):
  model = CM3Leon.load("scenes", batch_size=32)
  samples = model.generate([pair.caption for pair in heldout], seed=0)
  images = np.stack([np.asarray(sample.image) for [sample] in samples])
  facts = [pair.facts for pair in heldout]
  right = [verdict.correct for verdict in judge_all(images, facts)]
  assert np.mean(right) >= 0.7
  # The same images under the caption before: only captions that leave much open can hold.
  wrong = [verdict.correct for verdict in judge_all(images, facts[1:] + facts[:1])]
  assert np.mean(wrong) <= 0.1

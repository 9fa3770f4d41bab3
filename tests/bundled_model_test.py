"""The bundled model of scenes: it is small and whole, and its images show what captions say."""

import numpy as np
import pytest

from cm3leon_jax import CM3Leon
from cm3leon_jax.data import scenes
from cm3leon_jax.data.scene_world import ScenesConfig
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

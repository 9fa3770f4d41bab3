import numpy as np

from cm3leon_jax.generation.image_tasks import TextToImage
from cm3leon_jax.generation.sample import Sample
from cm3leon_jax.generation.text_tasks import Caption

IDS = np.zeros(64, np.int32)


def sample(task, *segments, **fields):
  return Sample(task, 0, 7, segments, (IDS,), (), IDS, IDS.astype(np.float32), False, (), **fields)


def test_a_sample_is_described_in_one_short_line():
  image = np.zeros((48, 32, 3), np.uint8)
  drawn = sample(TextToImage(prompt="a red bell"), image, clip_score=0.5)
  assert repr(drawn) == (
    "Sample(text_to_image, 'a red bell', image of 32 x 48, seed 7, CLIP score 0.500)"
  )
  text = sample(Caption(image="a.png"), "a bell\n" * 100)
  assert repr(text).startswith("Sample(caption, 'a bell\\na bell")
  assert len(repr(text)) < 120
  assert "\n" not in repr(text)

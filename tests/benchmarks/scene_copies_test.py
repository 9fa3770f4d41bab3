import numpy as np

from benchmarks.evidence import scene_copies
from examples.scenes import source
from examples.scenes.judge import judge
from examples.scenes.options import ScenesConfig

CONFIG = ScenesConfig(train=3_000, bank=100)


class Pixels:
  """Image tokenizer whose codes are the colors of the pixels."""

  def encode(self, images):
    return (images.astype(np.int32) @ [65_536, 256, 1]).reshape(len(images), -1)

  def decode(self, codes):
    channels = np.stack([codes >> 16, codes >> 8, codes], -1) & 255
    return channels.astype(np.uint8).reshape(-1, 48, 48, 3)


def test_pasted_codes_are_right_unless_the_caption_names_an_unseen_color():
  facts = [source.pair(CONFIG, "heldout", i).facts for i in range(90)]
  includes = [fact["include"] for fact in facts]
  images = scene_copies.draw(includes, scene_copies.sources(CONFIG), Pixels())
  assert [verdict.correct for verdict in judge.judge_all(images, facts)] == [
    fact["heldout"] not in ("pair", "rare") or not any("color" in clause for clause in include)
    for fact, include in zip(facts, includes)
  ]

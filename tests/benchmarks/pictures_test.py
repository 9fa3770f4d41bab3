import json

import numpy as np
import pytest

from benchmarks.evidence import pictures


def test_only_what_is_not_background_has_a_color():
  images = np.full((2, 8, 8, 3), 255, np.uint8)
  images[0, 2:4, 2:4] = 119  # Lab (50, 0, 0), as 0.184 of the light of white.
  images[1] = 250  # Background.
  black = np.zeros_like(images)
  assert pictures.color_error(images, images) == 0
  assert pictures.color_error(images, black) == pytest.approx(50, abs=0.3)
  others = images.copy()
  others[:, 5:] = 0  # Of the background, no difference counts.
  assert pictures.color_error(images, others) == 0


def test_the_share_of_codes_that_are_used():
  codes = [np.array([[0, 0], [1, 1]]), np.array([[0, 1]])]
  assert pictures.usage(codes, 8) == "25.0% of 8 codes, perplexity 2"


def test_heldout_pictures_by_kind(tmp_path):
  lines = [
    {"split": split, "image": f"{i}.png", "facts": {"kind": kind}}
    for i, (split, kind) in enumerate([("heldout", "set"), ("train", "set"), ("heldout", "text")])
  ]
  (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  found = pictures.heldout_paths(tmp_path)
  assert found == {"set": [tmp_path / "0.png"], "text": [tmp_path / "2.png"]}

import types

import numpy as np

from benchmarks import scene_codes


def test_the_true_images_are_all_correct_and_gray_ones_are_not():
  shown = {
    name: (images[:8], facts[:8]) for name, (images, facts) in scene_codes.drawings().items()
  }
  assert list(shown) == ["rare objects", "held-out scenes"]
  same = types.SimpleNamespace(encode=lambda x: x, decode=lambda x: x)
  gray = types.SimpleNamespace(encode=lambda x: x, decode=lambda x: np.full_like(x, 128))
  result = {}
  for images, facts in shown.values():
    assert scene_codes.measure(same, images, facts) == {"correct": 1.0, "psnr_db": 100.0}
    result["gray"] = {"rare objects": scene_codes.measure(gray, images, facts)}
    assert result["gray"]["rare objects"]["correct"] == 0
  result["gray"]["rare objects"]["psnr_db"] = 6.04
  assert scene_codes.markdown(result).splitlines()[2] == "| gray | 0.0%, 6.0 dB |"

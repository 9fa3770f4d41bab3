"""A source of records for tests: `config.raw.source = "own_records.py:records"`."""

import numpy as np


def records():
  for i in range(4):
    image = np.full((8, 8, 3), 60 * i, np.uint8)
    yield {"key": str(i), "caption": f"gray {i}", "image": image, "facts": {"n": i}}

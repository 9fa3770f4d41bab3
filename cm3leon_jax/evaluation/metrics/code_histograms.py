"""Compares how often two sets of images use each image code.

The frequencies ignore the arrangement of codes: the distance between an image and its shuffled
codes is 0. The distance detects a model that uses codes (colors, textures, flat
areas) too often or never, but it does not detect wrong shapes. It needs no extractor.
Its value depends on the image tokenizer.
"""

# C number of codes in the codebook of the tokenizer.

import numpy as np
import numpy.typing as npt
from scipy import special


def jensen_shannon_bits(first: npt.ArrayLike, second: npt.ArrayLike) -> float:
  """Returns the Jensen-Shannon divergence of two histograms of codes, [C] counts each, in bits.

    first = [3, 1], second = [1, 3]
    result = H(1/2, 1/2) - (H(3/4, 1/4) + H(1/4, 3/4)) / 2 = 1 - 0.811 = 0.189 bits

  The divergence is the information that one code gives about the set that contains it (Lin,
  "Divergence Measures Based on the Shannon Entropy", 1991). It is 0 if the frequencies are equal,
  and 1 if the sets share no code. Two sets from one distribution differ by chance: by about
  (C - 1) (1 / n + 1 / m) / (8 ln 2) bits for n and m independent codes. Codes of one image depend
  on each other, so the actual difference is larger. Compare the result with the divergence of two
  sets of real images.
  """
  first, second = (np.asarray(x, np.float64) / np.sum(x) for x in (first, second))
  middle = (first + second) / 2
  nats = (special.rel_entr(first, middle) + special.rel_entr(second, middle)).sum() / 2
  return min(1.0, max(0.0, float(nats / np.log(2))))

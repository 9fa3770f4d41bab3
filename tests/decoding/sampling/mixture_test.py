import numpy as np

from cm3leon_jax.decoding.sampling.contrastive import CONTRASTIVE
from cm3leon_jax.decoding.sampling.mixture import MIXTURE
from cm3leon_jax.decoding.sampling.top_p import TOP_P


def test_samples_take_turns():
  np.testing.assert_array_equal(MIXTURE.choose([4, 7], 3), [[0, 1, 0], [0, 1, 0]])
  np.testing.assert_array_equal(MIXTURE.choose([4, 7], 1), [[0], [1]])
  assert MIXTURE.members == (TOP_P, CONTRASTIVE)

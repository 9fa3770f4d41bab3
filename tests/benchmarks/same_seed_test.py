import numpy as np

from benchmarks import same_seed


def test_tokens_are_compared_up_to_the_first_that_differs():
  whole, other, short = np.array([1, 2, 3, 4]), np.array([1, 5, 3, 4]), np.array([1, 2])
  assert same_seed.compare([whole, short], [whole, short]) == (0, 6)
  assert same_seed.compare([whole, whole], [other, whole]) == (1, 6)
  assert same_seed.compare([whole], [short]) == (1, 3)  # A missing token differs.

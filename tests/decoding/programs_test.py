"""Tests that programs compile once per kind of arguments, and again for other shardings."""

import functools

import jax
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from tests.decoding.small import model_config, on_mesh, plain_requests, small_generator
from tests.models.tiny import random_params

SEEDS = [11, 12]


@pytest.mark.slow
def test_compiled_once_for_each_way_that_parameters_are_split():
  requests = plain_requests()[:2]
  with on_mesh(1, 2, 1):
    params = random_params(model_config())
    make = functools.partial(small_generator, image_head=False)
    generator = make(params=params)
    compiled = generator.programs.compiled
    first, count = generator.generate(requests, SEEDS), len(compiled)
    again = make(params=params).generate(requests, SEEDS)
    assert len(compiled) == count
    whole = jax.tree.map(lambda x: jax.sharding.reshard(x, P()), params)
    other = make(params=whole).generate(requests, SEEDS)
    assert len(compiled) > count
  for a, b, c in zip(first, again, other):
    np.testing.assert_array_equal(a.tokens, b.tokens)
    np.testing.assert_array_equal(a.tokens, c.tokens)

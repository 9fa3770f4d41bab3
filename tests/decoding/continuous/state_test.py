import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm3leon_jax.decoding.continuous import state
from cm3leon_jax.mesh import shard
from tests.decoding.small import on_mesh


@pytest.mark.parametrize("shards", [1, 2])
def test_a_slot_after_the_last_one_of_its_shard_stands_for_no_sample(shards):
  with on_mesh(shards, 1, 1):
    into, x = (shard(jnp.asarray(rows), "batch") for rows in ([1, 2, 3, 4], [7, 8]))
    slots = shard(jnp.array([1, 4 // shards]), "batch")
    found = jax.jit(state._put)(into, x, slots)
  np.testing.assert_array_equal(found, [1, 7, 3, 4])

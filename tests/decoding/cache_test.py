import jax
import jax.numpy as jnp
import numpy as np

from cm3leon_jax.decoding.cache import Cache
from cm3leon_jax.mesh import shard
from cm3leon_jax.models.attention import masked_attention
from tests.models.tiny import CONFIG, mesh_of

R, T, N, H = 2, 6, CONFIG.num_heads, CONFIG.head_dim


def test_attention_over_the_cache_is_attention_over_what_was_written():
  mask = jnp.tril(jnp.ones((T, T), bool))[None, None]
  with jax.set_mesh(mesh_of(1, 1, 1)):
    q, k, v = (shard(x, "batch", "length", "heads", "head_dim") for x in jax.random.normal(jax.random.key(0), (3, R, T, N, H)))
    cache = Cache.empty(CONFIG, R, T).write(1, 0, k[:, :4], v[:, :4])
    for t in (4, 5):
      cache = cache.write(1, t, k[:, t : t + 1], v[:, t : t + 1])
    found = cache.attend(1, q, jnp.broadcast_to(mask, (R, 1, T, T)))
    np.testing.assert_allclose(found, masked_attention(q, k, v, mask), atol=1e-5)
    untouched = cache.attend(0, q, jnp.broadcast_to(mask, (R, 1, T, T)))
  assert (np.asarray(untouched) == 0).all()


def test_rows_and_heads_are_split_over_the_mesh():
  with jax.set_mesh(mesh_of(1, 2, 4)):
    cache = Cache.empty(CONFIG, R, T)
    assert cache.keys.sharding.shard_shape(cache.keys.shape) == (CONFIG.num_layers, R // 2, N // 4, T, H)

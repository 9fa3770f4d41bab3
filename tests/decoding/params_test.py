import jax
import numpy as np
import pytest

from cm3leon_jax.decoding import params as params_lib
from cm3leon_jax.vocab import VocabLayout
from tests.decoding.small import VOCAB, model_config, on_mesh
from tests.models.tiny import random_params


@pytest.mark.parametrize(("family", "key_heads"), [("opt", 0), ("modern", 0), ("modern", 2)])
def test_the_same_numbers(family, key_heads):
  with on_mesh():
    config = model_config(family, num_kv_heads=key_heads)
    params = random_params(config)
    prepared = params_lib.prepare(params, config=config, vocab=VOCAB)
    table = np.asarray(params["embed" if family == "opt" else "head"])
    np.testing.assert_array_equal(prepared.image_head, table[VOCAB.text_size :].T)
    np.testing.assert_array_equal(prepared.head, table[[*range(264, 320), *range(264)]].T)
    np.testing.assert_array_equal(params_lib.head_ids(VOCAB), [*range(264, 320), *range(264)])
    for i, layer in enumerate(prepared.model["blocks"]):
      expected = jax.tree.map(lambda x, i=i: np.asarray(x)[i], params["blocks"])
      qkv = layer.pop("qkv")
      stored = (expected.pop("q"), *expected.pop("kv")) if key_heads else expected.pop("qkv")
      jax.tree.map(np.testing.assert_array_equal, layer, expected)
      assert len(qkv) == len(stored) == 3
      jax.tree.map(np.testing.assert_array_equal, list(qkv), list(stored))


def test_int8_literals():
  """Each output has its own scale: the largest absolute weight / 127."""
  quantized = jax.jit(params_lib.quantized, static_argnums=1)
  dequantized = jax.jit(params_lib.dequantized, static_argnums=1)
  made = quantized(np.float32([[127, 0.5], [-64, -2.54]]), (0,))
  np.testing.assert_array_equal(made.values, [[127, 25], [-64, -127]])
  np.testing.assert_allclose(made.scale, [[1.0, 0.02]], rtol=1e-6)
  np.testing.assert_allclose(
    dequantized({"up": made}, "float32")["up"], [[127, 0.5], [-64, -2.54]], rtol=1e-6
  )
  zeros = quantized(np.zeros((2, 2), np.float32), (0,))
  assert (np.asarray(dequantized({"up": zeros}, "float32")["up"]) == 0).all()


def test_the_head_is_split_where_it_divides():
  with on_mesh(1, 1, 8):
    config = model_config()
    prepared = params_lib.prepare(random_params(config), config=config, vocab=VOCAB)
    assert prepared.head.sharding.shard_shape(prepared.head.shape) == (32, 40)
    assert prepared.image_head.sharding.shard_shape(prepared.image_head.shape) == (32, 7)
    odd = VocabLayout(num_special=8, text_size=265, image_size=55)
    prepared = params_lib.prepare(random_params(config), config=config, vocab=odd)
    assert prepared.image_head.sharding.shard_shape(prepared.image_head.shape) == (32, 55)

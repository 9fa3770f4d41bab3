import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm3leon_jax.models import attention
from tests.models.tiny import mesh_of, place
from tests.refusals import refused


def normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def plain(q, k, v, segment_ids):
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  scores = np.einsum("BLNH,BTNH->BNLT", q, k) / q.shape[-1] ** 0.5
  length = q.shape[1]
  seen = np.tril(np.ones((length, length), bool)) & (
    segment_ids[:, :, None] == segment_ids[:, None, :]
  )
  weights = np.exp(np.where(seen[:, None], scores, -np.inf))
  return np.einsum("BNLT,BTNH->BLNH", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("length", [7, attention.BLOCK, attention.BLOCK + 9])
def test_blocks_of_queries_equal_the_full_matrix_in_fp64(length):
  q, k, v = normal(1, 3, 2, length, 2, 8)
  segment_ids = np.sort(np.random.default_rng(0).integers(0, 4, (2, length))).astype(np.int32)
  with jax.set_mesh(mesh_of(1, 1, 1)):
    found = jax.jit(attention.causal_attention)(q, k, v, segment_ids)
  np.testing.assert_allclose(found, plain(q, k, v, segment_ids), atol=2e-5)
  assert np.abs(np.asarray(found) - plain(q, k, v, np.ones_like(segment_ids))).max() > 0.1


def test_scores_of_bfloat16_are_summed_in_fp32():
  """In bfloat16, scores near 57 have errors of up to 0.125, and their weights of up to 1/8."""
  q, k, v = normal(3, 3, 1, 9, 1, 8)
  q[..., 0], k[..., 0] = 40, 4
  rows = [x.astype(jnp.bfloat16) for x in (q, k, v)]
  mask = np.tri(9, dtype=bool)[None, None]
  found = np.asarray(jax.jit(attention.masked_attention)(*rows, mask), np.float64)
  np.testing.assert_allclose(found, plain(*rows, np.ones((1, 9), np.int32)), atol=0.02)


@pytest.fixture(scope="module")
def rows():
  """Returns q, k, v with head size 64, and segment ids that change inside blocks of the kernels."""
  q, k, v = normal(1, 3, 2, 256, 4, 64)
  segment_ids = np.sort(np.random.default_rng(1).integers(0, 4, (2, 256))).astype(np.int32)
  return *map(jnp.asarray, (q, k, v)), jnp.asarray(segment_ids)


@pytest.mark.parametrize(("name", "key_heads"), [("splash", 4), ("triton", 4), ("triton", 2),
                                                 ("splash", 2), ("causal", 2)])  # fmt: skip
def test_the_kernels_equal_plain_attention_and_so_do_their_gradients(rows, name, key_heads):
  """Runs the kernels in Pallas's interpreter. The loss has a different weight for each output.

  Plain attention gets key heads that are repeated; the gradient of a shared head is their sum.
  """
  q, k, v, segment_ids = rows
  shared = q.shape[2] // key_heads
  k, v = (np.asarray(x[:, :, :key_heads]) for x in (k, v))
  repeated = [q, *(np.repeat(x, shared, axis=2) for x in (k, v))]
  weights = normal(4, *q.shape)
  kernel = getattr(attention, f"{name}_attention")
  if name != "causal":
    kernel = functools.partial(kernel, interpret=True)

  @functools.partial(jax.jit, static_argnums=0)
  def jitted(attend, qkv, segment_ids):
    return jax.value_and_grad(lambda qkv: (attend(*qkv, segment_ids) * weights).sum())(qkv)

  def value_and_grads(attend, segment_ids, qkv=(q, k, v)):
    with jax.set_mesh(mesh_of(1, 1, 2)):
      segment_ids = place(segment_ids, "batch", "length")
      qkv = [place(x, "batch", "length", "heads", "head_dim") for x in qkv]
      return jitted(attend, qkv, segment_ids)

  expected, expected_grads = value_and_grads(attention.causal_attention, segment_ids, repeated)
  found, grads = value_and_grads(kernel, segment_ids)
  np.testing.assert_allclose(found, expected, rtol=1e-4)
  expected_grads = [
    np.asarray(b).reshape(*a.shape[:3], -1, a.shape[3]).sum(3)
    for a, b in zip(grads, expected_grads)
  ]
  for a, b in zip(grads, expected_grads):
    np.testing.assert_allclose(a, b, atol=2e-4)
  _, other = value_and_grads(kernel, np.ones_like(segment_ids))
  assert np.abs(np.asarray(other[1]) - expected_grads[1]).max() > 0.1


def test_auto_is_plain_on_a_cpu_and_a_kernel_refuses_other_shapes(rows):
  q, k, v, segment_ids = rows
  with jax.set_mesh(mesh_of(1, 1, 1)):
    auto = jax.jit(attention.row_attention, static_argnums=0)("auto", q, k, v, segment_ids)
    plain = jax.jit(attention.causal_attention)(q, k, v, segment_ids)
    np.testing.assert_array_equal(auto, plain)
    for name, wrong in (("splash", q[:, :100]), ("triton", q[..., :48])):
      with refused(ValueError, name):
        attention.row_attention(name, wrong, wrong, wrong, segment_ids[:, : wrong.shape[1]])


@pytest.mark.parametrize(
  ("name", "platform", "keys"), [("triton", "cuda", "2x256x2x64"), ("splash", "tpu", "2x2x256x64")]
)
def test_the_kernels_read_shared_keys_without_copies(rows, name, platform, keys):
  """Lowers the forward and backward pass for GPUs and TPUs, and reads the types of operands."""
  q, _, _, segment_ids = rows
  kernel = getattr(attention, f"{name}_attention")
  with jax.set_mesh(mesh_of(1, 1, 1)):
    ids = place(segment_ids, "batch", "length")
    q, k = (place(x, "batch", "length", "heads", "head_dim") for x in (q, q[:, :, :2]))
    grad = jax.jit(jax.grad(lambda q, k, v: kernel(q, k, v, ids).sum(), (0, 1, 2)))
    lowered = grad.trace(q, k, k).lower(lowering_platforms=(platform,)).as_text()
  calls = [line for line in lowered.splitlines() if re.search("custom_call @.*(triton|tpu)", line)]
  pair = f"tensor<{keys}xf32>, tensor<{keys}xf32>, "
  assert sum(pair in line for line in calls) == (2 if name == "triton" else 3)

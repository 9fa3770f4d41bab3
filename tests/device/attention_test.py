"""Compares the attention kernels of an accelerator with plain attention on the CPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm3leon_jax.mesh import shard
from cm3leon_jax.models import attention
from tests.device.devices import cpu_mesh, device_mesh, error

LENGTH, HEADS = 512, 2
KERNELS = [
  pytest.param("splash", marks=pytest.mark.tpu),
  pytest.param("triton", marks=pytest.mark.gpu),
]


def rows(head_size, dtype):
  """Returns q, k, v of two rows, with segments that do not end where blocks of a kernel end."""
  q, k, v = jax.random.normal(jax.random.key(1), (3, 2, LENGTH, HEADS, head_size))
  segment_ids = np.sort(np.random.default_rng(1).integers(0, 4, (2, LENGTH))).astype(np.int32)
  return [np.asarray(x.astype(dtype)) for x in (q, k, v)], segment_ids


def value_and_gradients(attend, mesh, qkv, segment_ids):
  """Computes outputs, and gradients of a sum that gives each output another weight."""

  def total(*qkv):
    found = attend(*qkv, segment_ids).astype(jnp.float32)
    weights = jax.random.normal(jax.random.key(2), found.shape)
    return (found * weights).sum(), found

  with jax.set_mesh(mesh):
    segment_ids = shard(jnp.asarray(segment_ids), "batch", "length")
    qkv = [shard(jnp.asarray(x), "batch", "length", "heads", "head_dim") for x in qkv]
    run = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))
    (_, found), gradients = run(*qkv)
    return [np.asarray(x, np.float32) for x in (found, *gradients)]


def kernel(name):
  interpret = jax.devices()[0].platform == "cpu"
  return functools.partial(getattr(attention, f"{name}_attention"), interpret=interpret)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize(("dtype", "most"), [("float32", 1e-4), ("bfloat16", 2e-2)])
def test_a_kernel_and_its_gradient_equal_plain_attention(name, head_size, dtype, most):
  """Compares with fp32 on the CPU. As a control, attention over the whole row is far away."""
  qkv, segment_ids = rows(head_size, dtype)
  wide = [np.float32(x) for x in qkv]
  expected = value_and_gradients(attention.causal_attention, cpu_mesh(), wide, segment_ids)
  found = value_and_gradients(kernel(name), device_mesh(), qkv, segment_ids)
  for a, b in zip(found, expected, strict=True):
    assert error(a, b) < most
  whole = value_and_gradients(kernel(name), device_mesh(), qkv, np.ones_like(segment_ids))
  assert min(error(a, b) for a, b in zip(whole, expected, strict=True)) > 0.1


@pytest.mark.gpu
@pytest.mark.tpu
def test_auto_chooses_the_kernel_of_the_platform(on_device):
  """On a CPU, `auto` is plain attention. All results are bitwise equal."""
  qkv, segment_ids = rows(64, "bfloat16")
  name = {"tpu": "splash", "gpu": "triton"}.get(jax.devices()[0].platform, "plain")
  found, chosen = (
    jax.jit(functools.partial(attention.row_attention, n))(*qkv, segment_ids)
    for n in ("auto", name)
  )
  np.testing.assert_array_equal(found, chosen)

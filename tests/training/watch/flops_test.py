import dataclasses

import jax
import jax.numpy as jnp
import pytest

from cm3leon_jax.commands import config_file
from cm3leon_jax.config.model import AdapterConfig, ModelConfig
from cm3leon_jax.config.settings import settings_from_config
from cm3leon_jax.configs import cm3leon_7b
from cm3leon_jax.mesh import shard
from cm3leon_jax.models import adapters, transformer
from cm3leon_jax.training.step import loss
from cm3leon_jax.training.watch import flops
from tests.models.tiny import mesh_of


def product_flops(jaxpr, times=1):
  """Sums 2 x batch x M x N x K over all matrix products of a traced function, including scans."""
  total = 0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "dot_general":
      (contracted, _), _ = eqn.params["dimension_numbers"]
      depth = 1
      for axis in contracted:
        depth *= eqn.invars[0].aval.shape[axis]
      total += times * 2 * eqn.outvars[0].aval.size * depth
    inner = times * eqn.params["length"] if eqn.primitive.name == "scan" else times
    for value in eqn.params.values():
      body = getattr(value, "jaxpr", value)
      if hasattr(body, "eqns"):
        total += product_flops(body, inner)
  return total


@pytest.mark.parametrize(("targets", "key_heads"), [((), 0), (("q", "down"), 0), ((), 2)])
def test_model_flops_of_adapters_are_those_of_the_traced_products(targets, key_heads):
  """The step computes the gradient of the whole output table, so here all its rows are trained."""
  config = ModelConfig(
    family="modern", vocab_size=96, num_layers=3, width=32, num_heads=4, mlp_width=64,
    max_positions=64, dtype="float32", remat_policy="none", loss_chunk=32,
    num_kv_heads=key_heads,
  )  # fmt: skip
  adapter = AdapterConfig(rank=2, targets=targets)
  with jax.set_mesh(mesh_of(1, 1, 1)):
    ints = shard(jnp.ones((2, 64), jnp.int32), "batch", "length")
    data = dict.fromkeys(("inputs", "targets", "positions", "segment_ids"), ints)
    data["loss_weights"] = shard(jnp.ones((2, 64), jnp.float32), "batch", "length")
    base = jax.eval_shape(lambda: transformer.init_params(config, jax.random.key(0)))
    factors = jax.eval_shape(lambda: adapters.init(config, adapter, jax.random.key(0)))

    def value(factors, base):
      model = transformer.bind(config, base)
      matrices = adapters.scaled(factors, adapter.alpha)
      return loss.batch_nll(model, data, adapters=matrices, wanted=loss.Wanted(True, None))[0]

    found = product_flops(jax.make_jaxpr(jax.grad(value))(factors, base).jaxpr)
  beyond = 12 * 3 * 4 * config.head_dim * 64 / 2 * 128
  assert found == flops.model_flops(config, 128, 64, adapter) + beyond
  assert found < flops.model_flops(config, 128, 64)


COUNTED = [("7b", "minimal", 1.062), ("7b", "save_qkv", 1.161), ("7b", "save_attention", 1.210)]
COUNTED += [("350m", "minimal", 1.125), ("760m", "minimal", 1.102)]
COUNTED += [
  (size, "full", ratio) for size, ratio in (("7b", 1.259), ("350m", 1.322), ("760m", 1.298))
]


@pytest.mark.parametrize(("size", "policy", "counted"), COUNTED)
def test_executed_flops_are_those_that_the_compiler_for_tpus_counts(size, policy, counted):
  """The numbers are those of docs/scaling.md and docs/cards/."""
  config = settings_from_config(config_file.load(f"cm3leon_{size}")).model
  config = dataclasses.replace(config, remat_policy=policy)
  ratio = flops.hardware_flops(config, 1, 4_096) / flops.model_flops(config, 1, 4_096)
  assert ratio == pytest.approx(counted, abs=6e-4)


def test_7b_by_hand():
  """32 layers have 4 x 4,096^2 + 2 x 4,096 x 16,384 parameters, and a table 64,512 x 4,096."""
  config = settings_from_config(cm3leon_7b.get_config()).model
  assert (
    flops.matmul_params(config) == 32 * (67_108_864 + 134_217_728) + 264_241_152 == 6_706_692_096
  )
  per_token = 6 * 6_706_692_096 + 12 * 32 * 4_096 * 2_048
  assert flops.model_flops(config, 1, 4_096) == per_token == 43_461_378_048
  assert flops.model_flops(config, 4_096, 4_096) == 4_096 * per_token
  # 32 heads share 8 key heads: keys and values have a quarter of the parameters.
  shared = settings_from_config(cm3leon_7b.get_config("gqa")).model
  layer = (2 + 2 / 4) * 4_096**2 + 3 * 4_096 * 12_288
  assert flops.matmul_params(shared) == 32 * layer + 264_241_152 == 6_438_256_640


@pytest.mark.parametrize(
  ("kind", "peak"),
  [
    ("TPU7x", 2_307e12 / 2),
    ("TPU v5 lite", 197e12),
    ("TPU v5", 459e12),
    ("NVIDIA A100-SXM4-80GB", 312e12),
    ("NVIDIA H100 80GB HBM3", 989.5e12),
    ("NVIDIA H100 PCIe", 756.5e12),
  ],
)
def test_peaks_of_known_devices(kind, peak):
  assert flops.device_peak(kind) == peak


@pytest.mark.parametrize(
  "kind", ["cpu", "TPU v4 lite", "TPU v55", "TPU9x", "NVIDIA H1000", "NVIDIA GeForce RTX 4090"]
)
def test_no_peak_is_guessed(kind):
  assert flops.device_peak(kind) is None
  assert set(flops.Rates(1e12, 1, flops.device_peak(kind)).of(8.0, 2.0)) == {"tokens_per_second"}


def test_utilization_by_hand():
  """Two v5e chips reach 78.8 model TFLOP/s together, which is a fifth of their peak."""
  rates = flops.Rates(39.4e12, 2, flops.device_peak("TPU v5 lite"))
  assert rates.of(8.0, 1.0, steps=2) == {"tokens_per_second": 8.0, "mfu": 0.2}

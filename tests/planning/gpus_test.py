"""Tests hardware of GPUs without XLA's compiler for GPUs, which the tests do not install."""

import re
import sys
import types

import jax
import jax.numpy as jnp
import pytest

from cm3leon_jax.config.settings import decoding_mesh
from cm3leon_jax.errors import UserError
from cm3leon_jax.mesh import MeshConfig
from cm3leon_jax.planning import gpus, report
from cm3leon_jax.planning.hardware import GPUS
from cm3leon_jax.planning.hlo import Program
from cm3leon_jax.planning.topology import Chip, Topology
from tests.generation.run import SETTINGS
from tests.refusals import refused

V = jax.__version__

# Text like that of XLA:GPU: a loop whose condition is fused, an all-gather of two arrays, an
# asynchronous reduce-scatter, and kernels of attention for 2 rows of 8 tokens and 4 heads of 16.
TEXT = """HloModule jit_step, is_scheduled=true

%body (p: (s32[], bf16[2,8,4,16])) -> (s32[], bf16[2,8,4,16]) {
  %p = (s32[], bf16[2,8,4,16]{3,2,1,0}) parameter(0)
  %x = bf16[2,8,4,16]{3,2,1,0} get-tuple-element(%p), index=1
  %a = bf16[4,32]{1,0} constant({...})
  %b = bf16[8]{0} constant({...})
  %g = ((bf16[4,32]{1,0}, bf16[8]{0}), (bf16[16,32]{1,0}, bf16[32]{0})) all-gather-start(%a, %b)
  %f = (bf16[2,8,4,16]{3,2,1,0}, f32[2,4,8]{2,1,0}) custom-call(%x), custom_call_target="t", \
metadata={op_name="jit(train_step)/while/body/mha_forward/pallas_call"}
  %d = f32[2,4,8]{2,1,0} custom-call(%x), custom_call_target="t", \
metadata={op_name="jit(train_step)/while/body/mha_preprocess_backward/pallas_call"}
  %h = (bf16[2,8,4,16]{3,2,1,0}, bf16[2,8,4,16]{3,2,1,0}) custom-call(%x), \
custom_call_target="t", metadata={op_name="jit(train_step)/while/body/mha_backward/pallas_call"}
  ROOT %t = (s32[], bf16[2,8,4,16]{3,2,1,0}) tuple(%p, %x)
}

%fused (i: s32[]) -> pred[] {
  %i = s32[] parameter(0)
  %n = s32[] constant(3)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%condition (p: (s32[], bf16[2,8,4,16])) -> pred[] {
  %p = (s32[], bf16[2,8,4,16]{3,2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %c = pred[] fusion(%i), kind=kLoop, calls=%fused
}

%scatter (q: bf16[64]) -> bf16[8] {
  %q = bf16[64]{0} parameter(0)
  ROOT %r = bf16[8]{0} reduce-scatter(%q), dimensions={0}
}

ENTRY %main (z: bf16[2,8,4,16]) -> bf16[2,8,4,16] {
  %z = bf16[2,8,4,16]{3,2,1,0} parameter(0)
  %w = (s32[], bf16[2,8,4,16]{3,2,1,0}) while(%z), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"3"}}
  %q = bf16[64]{0} constant({...})
  %s = ((bf16[64]{0}), bf16[8]{0}) async-start(%q), calls=%scatter
  ROOT %r = bf16[2,8,4,16]{3,2,1,0} get-tuple-element(%w), index=1
}
"""


def test_a_program_of_xla_for_gpus_is_counted():
  program = Program(TEXT)
  assert program.flops() == 3 * (2 + 7) * 2 * 4 * 8 * 8 * 16
  gathered = 3 * 2 * (16 * 32 + 32)
  assert program.collectives() == {"all-gather": (3, gathered), "reduce-scatter": (1, 64 * 2)}


def test_the_description_of_an_h100_has_the_numbers_of_xlas_file():
  text = gpus.target(GPUS["h100"])
  assert text.count("{") == text.count("}") == 3
  found = dict(re.findall(r"(\w+): (\S+)", text))
  expected = {
    "core_count": "132", "fpus_per_core": "128", "l2_cache_size": "52428800", "major": "9",
    "shared_memory_per_core": "233472", "shared_memory_per_block_optin": "232448",
    "memory_bandwidth": "3352320000000", "clock_rate_ghz": "1.98",
  }  # fmt: skip
  found["major"] = re.search(r"capability { major: (\d+)", text)[1]
  assert {name: found[name] for name in expected} == expected
  assert abs(int(found["device_memory_size"]) / 84_942_979_072 - 1) < 1e-4


def install(folder, cuda: int, *packages) -> str:
  """Writes what pip writes about packages such as "plugin-0.1.0"; returns the folder's path."""
  for package in packages:
    name, _, version = package.partition("-")
    about = folder / f"jax_cuda{cuda}_{package}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Name: jax-cuda{cuda}-{name}\nVersion: {version}\n")
  return str(folder)


@pytest.mark.parametrize(
  ("packages", "reason"),
  [
    ((), "XLA's compiler is missing"),
    (("plugin-0.1.0", "pjrt-0.1.0"), "jax-cuda12-plugin 0.1.0, jax-cuda12-pjrt 0.1.0 does not fit"),
    ((f"plugin-{V}",), f"jax-cuda12-plugin {V} does not fit"),
  ],
)
def test_without_the_plugin_of_this_jax_the_pip_line_is_named(
  tmp_path, monkeypatch, packages, reason
):
  monkeypatch.setattr(sys, "path", [install(tmp_path, 12, *packages)])
  line = f"pip install --no-deps jax-cuda12-plugin=={V} jax-cuda12-pjrt=={V}"
  with refused(UserError, f"--topology names GPUs, but {reason}", line):
    gpus.load("h100-8")


def test_the_plugin_of_this_jax_is_accepted_for_either_cuda(tmp_path, monkeypatch):
  monkeypatch.setattr(sys, "path", [install(tmp_path, 13, f"plugin-{V}", f"pjrt-{V}")])
  gpus.check_plugin()


def test_an_unknown_gpu_is_refused_with_the_nearest_name():
  with refused(UserError, "--topology is 'h10-8'", "did you mean h100-8?"):
    gpus.load("h10-8")


@pytest.mark.parametrize(("gib", "fits"), [(1e-9, False), (1.0, True)])
def test_a_program_larger_than_the_memory_of_a_gpu_is_refused(gib, fits):
  """XLA compiles such programs for GPUs. The devices are CPUs, whose peak is unknown."""
  compiled = jax.jit(lambda x: x @ x).lower(jnp.ones((64, 64))).compile()
  topology = Topology("h100-8", Chip(gib, 1.0, 0.0, ""), 1, tuple(jax.devices()), " (92% of it)")
  with pytest.raises(ValueError if fits else UserError) as error:
    report.report(compiled, 1.0, topology)
  message = "peak FLOP/s" if fits else "h100-8: the program does not fit: it needs 0.00 GiB per"
  assert message in str(error.value)


@pytest.mark.parametrize(
  ("hosts", "heads", "keys", "mesh"),
  [
    (1, 32, 0, MeshConfig(1, 1, 8)),
    (8, 32, 0, MeshConfig(8, 1, 8)),
    (1, 12, 0, MeshConfig(2, 1, 4)),
    (1, 32, 2, MeshConfig(4, 1, 2)),
  ],
)
def test_decoding_shares_the_model_among_the_gpus_of_a_host(hosts, heads, keys, mesh):
  model = types.SimpleNamespace(
    num_heads=heads, num_kv_heads=keys, mlp_width=16_384, vocab_size=64_512
  )
  devices = [types.SimpleNamespace(platform="gpu", process_index=i // 8) for i in range(8 * hosts)]
  assert decoding_mesh(model, devices) == mesh
  assert decoding_mesh(SETTINGS.model, jax.devices()) == MeshConfig()

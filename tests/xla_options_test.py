import types

import jax
import pytest

from cm3leon_jax.xla_options import (
  DECODE_OPTIONS,
  OPTIONS,
  TRANSPOSED_OPTIONS,
  compiler_options,
)
from tests.models.tiny import mesh_of

TPU, GPU, CPU = ({*OPTIONS["TPU"]}, {*OPTIONS["NVIDIA"]}, {*DECODE_OPTIONS["cpu"]})


@pytest.mark.parametrize(
  ("kind", "train", "decode"),
  [
    ("TPU v5 lite", TPU, set()),
    ("TPU v6e", TPU, set()),
    ("NVIDIA H100 80GB HBM3", GPU, set()),
    ("cpu", set(), CPU),
  ],
)
def test_a_kind_of_device_has_its_options(kind, train, decode):
  devices = types.SimpleNamespace(flat=[types.SimpleNamespace(device_kind=kind)])
  mesh = types.SimpleNamespace(devices=devices)
  assert compiler_options(mesh).keys() == train
  for options in (DECODE_OPTIONS, TRANSPOSED_OPTIONS):
    assert compiler_options(mesh, options).keys() == decode


@pytest.mark.parametrize("table", [DECODE_OPTIONS, TRANSPOSED_OPTIONS])
def test_this_compiler_knows_the_options_of_its_kind(table):
  options = compiler_options(mesh_of(1, 1, 1), table)
  assert options
  assert jax.jit(lambda x: x + 1, compiler_options=options)(1) == 2
  with pytest.raises(Exception, match="xla_cpu_no_such_option"):
    jax.jit(lambda x: x + 1, compiler_options={"xla_cpu_no_such_option": True})(1)

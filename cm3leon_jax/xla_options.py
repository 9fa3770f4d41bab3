"""Compiler options by kind of device: all XLA flags that this project sets."""

from collections.abc import Mapping
from typing import Any

import jax

# Start of `jax.Device.device_kind` -> option -> (value, reason and source). Asynchronous
# collectives, a flag in older recipes, are libtpu's default on v5e; on v5p libtpu refuses
# asynchronous all-gathers as unsafe. MaxText's xla_tpu_scoped_vmem_limit_kib=98304 for v6e is left
# out: it changed no memory and made compilation five times as slow.
OPTIONS = {
  "TPU": {
    "xla_tpu_enable_data_parallel_all_reduce_opt": (
      True,
      "sums gradients over slices during the next layer's backward pass; axlearn, launch.py",
    ),
    "xla_tpu_data_parallel_opt_different_sized_ops": (
      True,
      "the same, for gradients of unequal sizes; axlearn, launch.py",
    ),
  },
  "NVIDIA": {
    "xla_gpu_enable_latency_hiding_scheduler": (
      True,
      "runs collectives during products; docs.jax.dev, GPU performance tips",
    ),
  },
}
# The same for the decoding loop.
DECODE_OPTIONS = {
  "cpu": {
    "xla_cpu_experimental_ynn_fusion_type": (
      "",  # No YNNPACK.
      "for few rows Eigen reads [in, out] weights at 25 to 28 GiB/s, YNNPACK at 17 to 21; "
      "measured, jax 0.10.2",
    ),
  },
}


def compiler_options(
  mesh: jax.sharding.Mesh, options: Mapping[str, Mapping[str, tuple[Any, str]]] = OPTIONS
) -> dict[str, Any]:
  """Returns `jax.jit`'s compiler_options for programs on `mesh`, from one of the tables above."""
  kind = mesh.devices.flat[0].device_kind
  return {
    name: value
    for start, table in options.items()
    if kind.startswith(start)
    for name, (value, _) in table.items()
  }

"""Compiler options by kind of device: the one table of XLA flags that this project sets."""

import jax

# Beginning of `jax.Device.device_kind` -> option -> (value, why and where it is from). Asynchronous collectives, which
# older recipes ask for by flag, are libtpu's default on v5e; on v5p it refuses that of all-gathers as unsafe. MaxText's
# xla_tpu_scoped_vmem_limit_kib=98304 for v6e is left out: it changed no memory and made compiling five times as slow.
OPTIONS = {
  "TPU": {
    "xla_tpu_enable_data_parallel_all_reduce_opt": (
      True,
      "sums of gradients over slices run beside the backward pass of the next layer; axlearn, launch.py",
    ),
    "xla_tpu_data_parallel_opt_different_sized_ops": (
      True,
      "the same, for gradients of unequal sizes; axlearn, launch.py",
    ),
  },
  "NVIDIA": {
    "xla_gpu_enable_latency_hiding_scheduler": (
      True,
      "collectives beside products; docs.jax.dev, GPU performance tips",
    ),
  },
}
# The same for the loop of decoding.
DECODE_OPTIONS = {
  "cpu": {
    "xla_cpu_experimental_ynn_fusion_type": (
      "",  # No YNNPACK.
      "for the few rows of decoding Eigen reads [in, out] weights at 25 to 28 GiB/s, YNNPACK at 17 to 21; measured, jax 0.10.2",
    ),
  },
}


def compiler_options(mesh: jax.sharding.Mesh, options=OPTIONS) -> dict:
  """For `jax.jit(..., compiler_options=)`, for programs that run on `mesh`; `options` is one of the tables."""
  kind = mesh.devices.flat[0].device_kind
  return {
    name: value
    for start, table in options.items()
    if kind.startswith(start)
    for name, (value, _) in table.items()
  }

"""Lists all XLA compiler options that this project sets, by kind of device."""

from collections.abc import Mapping
from typing import Any

import jax

# Prefix of `jax.Device.device_kind` -> option -> (value, reason and source). Older recipes also
# enable asynchronous collectives. These are the default on v5e, and libtpu rejects asynchronous
# all-gathers on v5p as unsafe. MaxText's xla_tpu_scoped_vmem_limit_kib=98304 for v6e is omitted,
# because it did not change memory use, and compilation took five times as long.
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
# Like OPTIONS, but for programs of the decoding loop.
DECODE_OPTIONS = {
  "cpu": {
    "xla_cpu_experimental_ynn_fusion_type": (
      "",  # The empty string disables YNNPACK.
      "with few rows, Eigen reads [in, out] matrices faster; measured with jax 0.10.2",
    ),
  },
}
# The same, if the matrices are stored as `models.products.Transposed`.
TRANSPOSED_OPTIONS = {
  "cpu": {
    "xla_cpu_experimental_ynn_fusion_type": (
      "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT",
      "YNNPACK for products by matrices, but not for the small products of attention, which it "
      "slows down; measured with jax 0.10.2",
    ),
  },
}


def compiler_options(
  mesh: jax.sharding.Mesh, options: Mapping[str, Mapping[str, tuple[Any, str]]] = OPTIONS
) -> dict[str, Any]:
  """Returns the compiler options for programs on `mesh`, from a table like `OPTIONS`."""
  kind = mesh.devices.flat[0].device_kind
  return {
    name: value
    for start, table in options.items()
    if kind.startswith(start)
    for name, (value, _) in table.items()
  }

"""Loads topologies of NVIDIA GPUs, for which XLA compiles programs without a GPU or a driver."""

import importlib.metadata

import jax
from jax.experimental import topologies

from cm3leon_jax.errors import UserError
from cm3leon_jax.planning import hardware as hardware_lib
from cm3leon_jax.planning import topology as topology_lib
from cm3leon_jax.planning.hardware import Gpu

PLUGINS = ("jax-cuda12", "jax-cuda13")
# GpuTargetConfigProto of XLA. A block can request all shared memory of a multiprocessor but 1 KiB.
TARGET = """gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: {optin}
  shared_memory_per_core: {gpu.shared} core_count: {gpu.cores} fpus_per_core: {gpu.units}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: {gpu.bandwidth} l2_cache_size: {gpu.cache} clock_rate_ghz: {gpu.clock}
  device_memory_size: {memory}
  cuda_compute_capability {{ major: {gpu.capability} feature_extension: {extension} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{gpu.kind}"
"""


def load(name: str, slices: int = 1) -> topology_lib.Topology:
  """Returns the topology of GPUs, such as h100-64 in hosts of 8, or of a TPU slice.

  Raises:
    UserError: the hardware does not exist, or its compiler is not installed.
  """
  hardware = hardware_lib.load(name, slices)
  if hardware.platform == "tpu":
    return topology_lib.load(name, slices)
  check_plugin()
  gpu = hardware_lib.GPUS[hardware.chip]
  shape = f"1x{hardware.hosts}x{hardware.per_host}"
  result = topologies.get_topology_desc("", "cuda", target_config=target(gpu), topology=shape)
  # The topology does not describe links between GPUs.
  chip = topology_lib.Chip(hardware.memory, gpu.bandwidth, 0.0, "planning/hardware.py")
  return topology_lib.Topology(hardware.name, chip, 1, tuple(result.devices), hardware.share)


def target(gpu: Gpu) -> str:
  """Returns the description of a GPU that XLA's compiler reads."""
  extension = "ACCELERATED_FEATURES" if gpu.capability >= 9 else "NONE"
  memory, optin = int(gpu.memory * 2**30), gpu.shared - 1024
  return TARGET.format(gpu=gpu, extension=extension, memory=memory, optin=optin)


def check_plugin() -> None:
  """Raises UserError unless the packages of XLA's compiler for GPUs have the version of jax."""
  result = {
    f"{plugin}-{part}": version(f"{plugin}-{part}")
    for plugin in PLUGINS
    for part in ("plugin", "pjrt")
  }
  pairs = [[result[f"{plugin}-{part}"] for part in ("plugin", "pjrt")] for plugin in PLUGINS]
  if [jax.__version__] * 2 in pairs:
    return
  line = " ".join(f"jax-cuda12-{part}=={jax.__version__}" for part in ("plugin", "pjrt"))
  others = ", ".join(f"{name} {number}" for name, number in result.items() if number)
  why = f"{others} does not fit jax {jax.__version__}" if others else "XLA's compiler is missing"
  raise UserError(
    f"--topology names GPUs, but {why}: pip install --no-deps {line} (no GPU or driver is needed)."
  )


def version(package: str) -> str:
  """Returns the version of an installed package, or ""."""
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return ""

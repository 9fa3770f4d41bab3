"""Maps names of hardware, such as v5e-256, to devices and to the names that launchers use."""

from collections.abc import Mapping
import dataclasses
import math
import re

from cm3leon_jax.errors import UserError
from cm3leon_jax.planning.topology import CHIPS, SLICES, own_name, suggestion
from cm3leon_jax.training.watch.flops import device_peak

GPUS_PER_HOST = 8
# Share of a GPU's memory that XLA may use. The launchers for GPUs set
# XLA_PYTHON_CLIENT_MEM_FRACTION to this value (default: 0.75). The rest is for NCCL and CUDA.
GPU_FRACTION = 0.92


@dataclasses.dataclass(frozen=True)
class Tpu:
  """Properties of a TPU generation.

  Attributes:
    gke: value of the node label cloud.google.com/gke-tpu-accelerator.
    accelerator: first part of a Cloud TPU accelerator type, such as v5litepod in v5litepod-256.
    units: number in an accelerator type per chip: 2 for v5p and tpu7x, whose types count cores,
      otherwise 1.
    runtime: software version for TPU VMs; "" if the TPU VM API does not offer the generation.
    machines: maps the number of chips of a host to (vCPUs, GB of memory) of its machine type in
      GKE.
  """

  device_kind: str
  gke: str
  accelerator: str
  units: int
  runtime: str
  machines: Mapping[int, tuple[int, int]]


# Sources: cloud.google.com/tpu/docs/runtimes and /kubernetes-engine/docs/concepts/plan-tpus.
TPUS = {
  "v5e": Tpu(
    "TPU v5 lite",
    "tpu-v5-lite-podslice",
    "v5litepod",
    1,
    "v2-alpha-tpuv5-lite",
    {1: (24, 48), 4: (112, 192), 8: (224, 384)},
  ),
  "v5p": Tpu("TPU v5p", "tpu-v5p-slice", "v5p", 2, "v2-alpha-tpuv5", {4: (208, 448)}),
  "v6e": Tpu(
    "TPU v6 lite",
    "tpu-v6e-slice",
    "v6e",
    1,
    "v2-alpha-tpuv6e",
    {1: (44, 176), 4: (180, 720), 8: (180, 1440)},
  ),
  "tpu7x": Tpu("TPU7x", "tpu7x", "tpu7x", 2, "", {4: (224, 960)}),
}


@dataclasses.dataclass(frozen=True)
class Gpu:
  """Properties of an NVIDIA GPU.

  Attributes:
    kind: name in JAX.
    memory: memory that CUDA reports, in GiB.
    bandwidth: bytes/s of the memory.
    cores, units, clock: number of multiprocessors, fp32 units of each, GHz.
    cache, shared: bytes of the L2 cache, and of the shared memory of a multiprocessor.
    capability: major version of the compute capability.
  """

  kind: str
  memory: float
  bandwidth: int
  cores: int
  units: int
  clock: float
  cache: int
  shared: int
  capability: int


# The numbers are those of XLA's files xla/backends/gpu/target_config/specs/{a100_sxm_80,h100_sxm,
# h200,b200}.txtpb in August 2026. The memory of h200 is from errors in public issues, because the
# 141 GiB of XLA's file are those of the data sheet in GB.
_HBM3 = (132, 128, 1.98, 52_428_800, 233_472, 9)
GPUS = {
  "a100": Gpu(
    "NVIDIA A100-SXM4-80GB", 79.26, 2_039_040_000_000, 108, 64, 1.41, 41_943_040, 167_936, 8
  ),
  "h100": Gpu("NVIDIA H100 80GB HBM3", 79.11, 3_352_320_000_000, *_HBM3),
  "h200": Gpu("NVIDIA H200", 139.80, 4_800_000_000_000, *_HBM3),
  "b200": Gpu("NVIDIA B200", 178.36, 7_672_320_000_000, 148, 128, 1.965, 132_644_864, 233_472, 10),
}


@dataclasses.dataclass(frozen=True)
class Hardware:
  """Devices of a job.

  Attributes:
    name: name that the user gave, such as v5e-256 or h100-64.
    chip: TPU generation or GPU model, such as v5e or h100.
    platform: "tpu" or "gpu".
    memory: memory that programs may use on each device, in GiB.
    torus: number of chips along each dimension of a TPU slice; for GPUs, the number of GPUs per
      host.
    slices: number of TPU slices or GPU hosts. The network between them is slow.
  """

  name: str
  chip: str
  platform: str
  device_kind: str
  memory: float
  torus: tuple[int, ...]
  slices: int
  per_host: int

  @property
  def chips(self) -> int:
    """Number of chips or GPUs in all slices or hosts."""
    return math.prod(self.torus) * self.slices

  @property
  def devices(self) -> int:
    """Number of JAX devices in all slices."""
    return self.chips * self.devices_per_chip

  @property
  def devices_per_chip(self) -> int:
    """JAX devices of a chip or GPU."""
    return CHIPS[self.chip].devices if self.platform == "tpu" else 1

  @property
  def share(self) -> str:
    """Says which share of a GPU's memory is `memory`; "" for TPUs."""
    if self.platform == "tpu":
      return ""
    total = GPUS[self.chip].memory
    return (
      f" ({GPU_FRACTION:.0%} of {total:.2f}, as the launchers set XLA_PYTHON_CLIENT_MEM_FRACTION; "
      f"JAX's default, 75%, is {0.75 * total:.2f})"
    )

  @property
  def hosts_per_slice(self) -> int:
    return math.prod(self.torus) // self.per_host

  @property
  def hosts(self) -> int:
    return self.hosts_per_slice * self.slices

  @property
  def tpu(self) -> Tpu:
    """TPU generation of the chips."""
    return TPUS[self.chip]

  @property
  def accelerator(self) -> str:
    """Accelerator type of a TPU slice in Cloud TPU, such as v5litepod-256."""
    return f"{self.tpu.accelerator}-{math.prod(self.torus) * self.tpu.units}"

  @property
  def shape(self) -> str:
    """Topology of a TPU slice in GKE, such as 16x16."""
    return "x".join(map(str, self.torus))

  @property
  def machine(self) -> tuple[int, int]:
    """Numbers of vCPUs and GB of memory of a TPU host."""
    return self.tpu.machines.get(self.per_host, min(self.tpu.machines.values()))

  @property
  def requests(self) -> tuple[int, int]:
    """Numbers of CPUs and GiB that a pod on a TPU host requests, which are half of the machine.

    The other half is for the system and for pods that use no chips.
    """
    cpus, memory = self.machine
    return cpus // 2, memory // 2

  def __str__(self) -> str:
    several = f"{self.slices} x " if self.platform == "tpu" and self.slices > 1 else ""
    hosts = f"{self.hosts:,} host{'s' * (self.hosts > 1)}"
    kind = "GPU" if self.platform == "gpu" else "chip"
    chips = f"{self.chips:,} {kind}{'s' * (self.chips > 1)}"
    if self.devices_per_chip > 1:
      chips += f" ({self.devices:,} devices)"
    return f"{several}{self.name}: {chips}, {hosts}"


def load(name: str, slices: int = 1) -> Hardware:
  """Returns the hardware with this name.

  Args:
    name: a slice (v5e-256 or v5litepod-256), a shape (v5p:4x4x8), or a number of GPUs (h100-64).
    slices: number of TPU slices; 1 for GPUs.

  Raises:
    UserError: the name is unknown, or such a number of chips or slices does not exist.
  """
  given, name = name, own_name(name.lower())
  chip, _, size = name.replace("-", ":", 1).partition(":")
  if chip in GPUS:
    return _gpus(name, chip, size, slices)
  shape = SLICES.get(name, size)
  if chip not in TPUS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", shape):
    near = suggestion(name, tuple(f"{gpu}-{size or 64}" for gpu in GPUS))
    raise UserError(
      f"--topology is '{given}': {near}give a slice "
      f"({', '.join(SLICES)}), a chip and a shape, as in v5p:4x4x8, or GPUs and their number, as "
      f"in h100-64 (GPUs: {', '.join(GPUS)})."
    )
  torus = tuple(map(int, shape.split("x")))
  chips = math.prod(torus)
  # A slice of up to 8 chips is one host for v5e and v6e. All other hosts have 4 chips.
  per_host = chips if chips < 4 or (chips == 8 and chip in ("v5e", "v6e")) else 4
  if chips % per_host:
    raise UserError(
      f"--topology is '{name}', but {chips} chips do not fill whole hosts: give a multiple of 4 "
      "chips."
    )
  tpu = TPUS[chip]
  return Hardware(name, chip, "tpu", tpu.device_kind, CHIPS[chip].hbm, torus, slices, per_host)


def _gpus(name: str, chip: str, number: str, slices: int) -> Hardware:
  if slices != 1:
    raise UserError(
      f"--slices is {slices}, but only TPUs have slices: omit --slices, and give the number of all "
      "GPUs in --topology."
    )
  count = int(number) if re.fullmatch(r"[1-9]\d{0,6}", number) else 0
  per_host = min(count, GPUS_PER_HOST)
  if not count or count % per_host:
    raise UserError(
      f"--topology is '{name}'; the number of GPUs must be at most {GPUS_PER_HOST}, the GPUs of "
      f"one host, or a multiple of {GPUS_PER_HOST}, as in {chip}-64."
    )
  gpu = GPUS[chip]
  usable = gpu.memory * GPU_FRACTION
  return Hardware(name, chip, "gpu", gpu.kind, usable, (per_host,), count // per_host, per_host)


def peak_of(device_kind: str) -> float:
  """Returns the peak FLOP/s of a device with this `jax.Device.device_kind`.

  Raises:
    ValueError: `flops.device_peak` does not know this kind.
  """
  if (peak := device_peak(device_kind)) is None:
    raise ValueError(f"the peak FLOP/s of '{device_kind}' is unknown.")
  return peak

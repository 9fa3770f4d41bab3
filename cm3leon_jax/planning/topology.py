"""Describes TPU chips and topologies for which XLA compiles programs without a TPU."""

import dataclasses
import difflib
import os
import re

import jax
from jax.experimental import topologies

from cm3leon_jax import extras
from cm3leon_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Chip:
  """A TPU chip or GPU.

  Attributes:
    hbm: memory of a device in GiB, as the compiler reports it when a program does not fit.
    hbm_bandwidth: bytes/s.
    ici_bandwidth: bytes/s between a device and its neighbors, summed over all its links; 0 if
      unknown.
    source: web page with the two bandwidths.
    options: compiler options that keep the text of a compiled program readable for `hlo`.
    devices: JAX devices of a chip. A chip of tpu7x is two devices, each with half of its memory and
      bandwidths.
  """

  hbm: float
  hbm_bandwidth: float
  ici_bandwidth: float
  source: str
  options: tuple[tuple[str, bool], ...] = ()
  devices: int = 1


# XLA's text of a program that uses sparse cores cannot be parsed.
NO_SPARSECORE = (
  ("xla_tpu_offload_gather_to_sparsecore", False),
  ("xla_tpu_enable_offloading_scatter_to_sparsecore", False),
)
_ON_SPARSECORE = (
  *("offloading_copy_to_sparsecore", "offloading_gather_to_sparsecore"),
  *("offloading_dynamic_padding_to_sparsecore", "offloading_module_to_sparsecore"),
  *("offloading_reduce_to_sparsecore", "offloading_reshape_to_sparsecore"),
  *("offloading_slice_to_sparsecore", "offloading_sort_to_sparsecore"),
  "offloading_xprecision_to_sparsecore",
  *("sparse_core_compute_offload", "unified_sparse_core_offloader"),
  *("sparse_core_collective_offload_all_gather", "sparse_core_collective_offload_all_reduce"),
  *("sparse_core_collective_offload_2d_all_gather", "sparse_core_collective_offload_3d_all_gather"),
  "sparse_core_collective_offload_reduce_scatter",
  "sparse_core_collective_offload_nd_reduce_scatter",
)
NO_SPARSECORE_7X = (*NO_SPARSECORE, *((f"xla_tpu_enable_{name}", False) for name in _ON_SPARSECORE))
CHIPS = {
  "v5e": Chip(15.75, 819e9, 1600e9 / 8, "cloud.google.com/tpu/docs/v5e"),
  "v5p": Chip(95.73, 2765e9, 4800e9 / 8, "cloud.google.com/tpu/docs/v5p", NO_SPARSECORE),
  "v6e": Chip(31.24, 1640e9, 3584e9 / 8, "cloud.google.com/tpu/docs/v6e", NO_SPARSECORE),
  "tpu7x": Chip(94.74, 3690e9, 300e9, "cloud.google.com/tpu/docs/tpu7x", NO_SPARSECORE_7X, 2),
}
# Name of a slice -> shape of its torus. For other shapes, users write names such as v5p:4x4x8. The
# number in a name of v5p or tpu7x counts cores, two per chip: v5p-8 has 4 chips.
_TORUS_2D = {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_TORUS_3D = {8: "2x2x1", 16: "2x2x2", 32: "2x2x4", 64: "2x4x4", 128: "4x4x4", 256: "4x4x8"}
_TORUS_3D |= {512: "4x8x8", 1024: "8x8x8"}
_TORI = {"v5e": _TORUS_2D, "v6e": _TORUS_2D, "v5p": _TORUS_3D, "tpu7x": _TORUS_3D}
SLICES = {f"{chip}-{n}": shape for chip, tori in _TORI.items() for n, shape in tori.items()}
# Chip names in Cloud TPU's accelerator types and in JAX -> this project's chip names.
ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "v7x": "tpu7x", "7x": "tpu7x"}
# Prefix of `jax.Device.device_kind` -> chip. Longer ones precede shorter ones, as in flops.py.
KINDS = {"TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5p": "v5p", "TPU v5": "v5p"}
KINDS |= {"TPU v6 lite": "v6e", "TPU v6e": "v6e", "TPU7x": "tpu7x"}


def own_name(name: str) -> str:
  """Translates Cloud TPU's name for a slice to this project's name.

  >>> own_name("v5litepod-256"), own_name("v5litepod:4x4"), own_name("v5p-8")
  ('v5e-256', 'v5e:4x4', 'v5p-8')
  """
  chip = re.split("[-:]", name, maxsplit=1)[0]
  return ALIASES.get(chip, chip) + name[len(chip) :]


def suggestion(name: str, others: tuple[str, ...] = ()) -> str:
  """Returns "did you mean v5e-256? " with the most similar slice, or "" if no name is similar.

  Of a known chip, it is the slice with the nearest number. `others` can also be suggested.
  """
  chip, _, size = name.partition("-")
  if chip in _TORI and re.fullmatch(r"\d{1,6}", size):
    return f"did you mean {chip}-{min(_TORI[chip], key=lambda n: abs(n - int(size)))}? "
  close = difflib.get_close_matches(name, [*SLICES, *others], n=1)
  return f"did you mean {close[0]}? " if close else ""


@dataclasses.dataclass(frozen=True)
class Topology:
  """Devices to compile for.

  Attributes:
    name: chip and shape, such as v5p:4x4x8.
    devices: JAX devices that programs can be compiled for.
    share: share of a GPU's memory that `chip.hbm` is; "" for TPUs.
  """

  name: str
  chip: Chip
  slices: int
  devices: tuple
  share: str = ""


def device_memory(device: jax.Device) -> int | None:
  """Returns the bytes that programs can use on a device; None for CPUs and unknown devices.

  If the backend does not say the number, it is looked up in a table of chips.
  """
  if device.platform == "cpu":
    return None
  try:
    limit = (device.memory_stats() or {}).get("bytes_limit")
  except (jax.errors.JaxRuntimeError, NotImplementedError):  # For a topology's devices.
    limit = None
  if limit:
    return int(limit)
  for kind, chip in KINDS.items():
    if device.device_kind == kind or device.device_kind.startswith((f"{kind} ", f"{kind}-")):
      return int(CHIPS[chip].hbm * 2**30)
  return None


def prepare() -> None:
  """Prepares libtpu for a machine without a TPU. Call it before the first use of JAX.

  libtpu may print that it finds no TPU.
  """
  jax.config.update("jax_platforms", "cpu")
  # Without this, libtpu queries the cloud's metadata server for minutes.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")


def load(name: str, slices: int = 1) -> Topology:
  """Returns the topology of a slice in `SLICES`, or of a chip and a shape such as v5p:4x4x8.

  Cloud TPU's names, such as v5litepod-256, also work.

  Raises:
    UserError: the chip or shape does not exist, or libtpu is not installed.
  """
  given, name = name, own_name(name.lower())
  generation, _, shape = name.replace("-", ":", 1).partition(":")
  shape = SLICES.get(name, shape)
  if generation not in CHIPS or not re.fullmatch(r"\d+(x\d+)+", shape):
    raise UserError(
      f"--topology is '{given}': {suggestion(name)}give a slice ({', '.join(SLICES)}) or a chip "
      f"and a shape, as in v5p:4x4x8; chips: {', '.join(CHIPS)}."
    )
  full = f"{generation}:{shape}"
  more = {"num_slices": slices} if slices > 1 else {}
  try:
    devices = topologies.get_topology_desc(platform="tpu", topology_name=full, **more).devices
  except Exception as error:  # libtpu raises errors of various types.
    reason = str(error).splitlines()[0][:160]
    raise UserError(
      f"--topology {full} cannot be loaded: check the shape, and {extras.install('aot')}: {reason}"
    ) from error
  return Topology(full, CHIPS[generation], slices, tuple(devices))

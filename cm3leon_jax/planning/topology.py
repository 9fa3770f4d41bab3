"""TPU topologies that XLA compiles for without one, and what their chips can do."""

import dataclasses
import os
import re

import jax
from jax.experimental import topologies

from cm3leon_jax.config import UserError


@dataclasses.dataclass(frozen=True)
class Chip:
  """A TPU chip.

  Attributes:
    hbm: memory that XLA gives out, GiB: what the compiler says is available when a program does not fit.
    hbm_bandwidth: bytes/s.
    ici_bandwidth: bytes/s between chips, all links together.
    source: of the two bandwidths.
    options: compiler options without which the text of a compiled program cannot be had.
  """

  hbm: float
  hbm_bandwidth: float
  ici_bandwidth: float
  source: str
  options: tuple[tuple[str, bool], ...] = ()


# What the sparse cores do is printed in a way that XLA cannot read back.
NO_SPARSECORE = (
  ("xla_tpu_offload_gather_to_sparsecore", False),
  ("xla_tpu_enable_offloading_scatter_to_sparsecore", False),
)
CHIPS = {
  "v5e": Chip(15.75, 819e9, 1600e9 / 8, "cloud.google.com/tpu/docs/v5e"),
  "v5p": Chip(95.73, 2765e9, 4800e9 / 8, "cloud.google.com/tpu/docs/v5p", NO_SPARSECORE),
  "v6e": Chip(31.24, 1640e9, 3584e9 / 8, "cloud.google.com/tpu/docs/v6e", NO_SPARSECORE),
}
# Names of slices -> shape of the torus. Of v5p Google counts cores, two a chip: v5p-8 are 4 chips. Any other shape is given as
# in v5p:4x4x8.
SLICES = {
  "v5e-4": "2x2", "v5e-8": "2x4", "v5e-16": "4x4", "v5e-32": "4x8", "v5e-64": "8x8", "v5e-128": "8x16", "v5e-256": "16x16",
  "v6e-4": "2x2", "v6e-8": "2x4", "v6e-16": "4x4", "v6e-32": "4x8", "v6e-64": "8x8", "v6e-128": "8x16", "v6e-256": "16x16",
  "v5p-8": "2x2x1", "v5p-16": "2x2x2", "v5p-32": "2x2x4", "v5p-64": "2x4x4", "v5p-128": "4x4x4", "v5p-256": "4x4x8",
  "v5p-512": "4x8x8", "v5p-1024": "8x8x8",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Topology:
  """Devices to compile for. name: `v5p:4x4x8`; torus: chips along each dimension of a slice; slices: how many of them."""

  name: str
  chip: Chip
  torus: tuple[int, ...]
  slices: int
  devices: tuple


def prepare() -> None:
  """Lets libtpu be loaded on a machine without a TPU, before JAX's first use; it may print that it found none."""
  jax.config.update("jax_platforms", "cpu")
  os.environ.setdefault(
    "TPU_SKIP_MDS_QUERY", "1"
  )  # Else it asks the cloud's metadata server for minutes.
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")


def load(name: str, slices: int = 1) -> Topology:
  """The topology of a name of `SLICES` or a generation and shape, as in `v5p:4x4x8`.

  Raises:
    UserError: there is no such chip or shape, or libtpu is not installed.
  """
  generation, _, shape = name.replace("-", ":", 1).partition(":")
  shape = SLICES.get(name, shape)
  if generation not in CHIPS or not re.fullmatch(r"\d+(x\d+)+", shape):
    raise UserError(
      f"--topology is '{name}': give a slice ({', '.join(SLICES)}) or a chip and a shape, as in v5p:4x4x8; "
      f"chips: {', '.join(CHIPS)}."
    )
  full = f"{generation}:{shape}"
  more = {"num_slices": slices} if slices > 1 else {}
  try:
    devices = topologies.get_topology_desc(platform="tpu", topology_name=full, **more).devices
  except Exception as error:  # libtpu raises whatever it likes.
    reason = str(error).splitlines()[0][:160]
    raise UserError(
      f"--topology {full} cannot be compiled for here (pip install libtpu; known shape?): {reason}"
    ) from error
  return Topology(
    full, CHIPS[generation], tuple(map(int, shape.split("x"))), slices, tuple(devices)
  )

"""Finds combinations of mesh, batch and remat policy that fit a topology, fastest first."""

from collections.abc import Callable, Iterator
import dataclasses
import math
from typing import Any

from cm3leon_jax.config import UserError
from cm3leon_jax.mesh import MeshConfig, create_mesh
from cm3leon_jax.models.config import ModelConfig, RematPolicy
from cm3leon_jax.models.transformer import KEPT
from cm3leon_jax.planning.hardware import Hardware
from cm3leon_jax.planning.topology import Topology
from cm3leon_jax.settings import Settings

# From least to most recomputation.
POLICIES: tuple[RematPolicy, ...] = ("minimal", "save_qkv", "save_attention", "offload", "full")
# Rows per device, most first, because parameters are gathered less often with more rows.
BATCHES = (16, 8, 4, 2, 1)


@dataclasses.dataclass(frozen=True)
class Candidate:
  """Combination of mesh, batch and remat policy.

  `batch` is the number of rows per device in one pass. A step has as many passes as needed.
  """

  mesh: MeshConfig
  batch: int
  policy: RematPolicy

  def apply(self, settings: Settings, topology: Topology) -> Settings:
    """Returns `settings` with this mesh, policy and batch, and the same global batch.

    Raises:
      UserError: the global batch is not a multiple of the rows in one pass of all devices.
    """
    mesh = self.mesh
    one_pass = self.batch * len(topology.devices) // mesh.tensor
    rows = settings.train.global_batch_size
    if rows % one_pass:
      raise UserError(
        f"config.train.global_batch_size is {rows}; it must be a multiple of {one_pass}, the "
        "number of rows in one pass of all devices."
      )
    train = dataclasses.replace(
      settings.train, rows_per_device=self.batch, gradient_accumulation_steps=1
    )
    return dataclasses.replace(
      settings,
      mesh=mesh,
      model=dataclasses.replace(settings.model, remat_policy=self.policy),
      train=train,
    )

  @property
  def flags(self) -> str:
    """Flags of `cm3leon train` for this candidate."""
    parts = [f"--config.mesh.{axis}={n}" for axis, n in dataclasses.asdict(self.mesh).items()]
    parts += [f"--config.train.rows_per_device={self.batch}"]
    return " ".join([*parts, f"--config.model.remat_policy={self.policy}"])


def meshes(topology: Topology | Hardware) -> Iterator[MeshConfig]:
  """Yields meshes whose axes follow the torus, with `tensor` of size 1, 2 and 4.

  `data` spans the slices. `fsdp_inner` and `tensor` together span the last dimension of the torus,
  and the devices of a chip if it has several. `fsdp` spans the other dimensions.
  """
  torus = [n for n in topology.torus if n > 1] or [1]
  outer, inner = math.prod(torus[:-1]), torus[-1] * topology.devices_per_chip
  yield MeshConfig(topology.slices, outer, 1, inner)
  for tensor in (2, 4):
    if inner % tensor == 0 and tensor <= inner:
      yield MeshConfig(topology.slices, outer, tensor, inner // tensor)


def kept_bytes(model: ModelConfig, tokens: int, policy: str) -> int:
  """Computes a lower bound of the bytes that a policy keeps on a device for the backward pass."""
  mlp = (2 if model.traits.gated else 1) * model.mlp_width / model.width
  heads = model.num_heads * model.head_dim / model.width
  widths = {"qkv": 3 * heads, "attention": heads, "middle": 1, "mlp": mlp}
  kept = 1 + sum(widths[name] for name in KEPT.get(policy, ()))  # 1 is the layer's input.
  bytes_per_value = 2 if model.dtype == "bfloat16" else 4
  return int(kept * tokens * model.width * model.num_layers * bytes_per_value)


def search(
  settings: Settings, topology: Topology, compile_one: Callable, report_line: Callable[[str], None]
) -> list[dict]:
  """Compiles, for each mesh and batch, the policy with the least recomputation that fits.

  `compile_one` maps (settings, mesh) to a result of `compile_report`, and raises UserError if the
  program does not fit. `report_line` is called with a line of text for each candidate. Returns the
  reports of the candidates that fit, with the additional keys "candidate" and "flags". They are
  sorted by `cost`, and then by the compiler's cycles.
  """
  reports = []
  for config in meshes(topology):
    mesh = create_mesh(config, topology.devices)
    for batch in BATCHES:
      for policy in POLICIES:
        candidate = Candidate(config, batch, policy)
        try:
          changed = candidate.apply(settings, topology)
        except UserError as error:
          report_line(f"{_name(candidate)}: {error}")
          break
        tokens = batch * settings.data.sequence_length
        if kept_bytes(settings.model, tokens, policy) // config.tensor > topology.chip.hbm * 2**30:
          continue
        try:
          report = compile_one(changed, mesh)
        except UserError as error:
          report_line(f"{_name(candidate)}: {error}")
          continue
        least = f"at least {cost(report) * 1e6:.3f} us per token and device"
        report_line(f"{_name(candidate)}: {report['sum_gib']:.2f} GiB, {least}")
        report["candidate"] = dataclasses.asdict(candidate)
        report["flags"] = candidate.flags
        reports.append(report)
        break

  def speed(report: dict[str, Any]) -> tuple[float, float]:
    cycles = report["cycles"] * report["devices"] / report["tokens"]
    return round(cost(report), 9), cycles

  return sorted(reports, key=speed)


def cost(report: dict) -> float:
  """Computes a lower bound of the seconds per token and device, from products and collectives."""
  tokens = report["tokens"] / report["devices"]
  return max(report["compute_seconds"], report["collective_seconds"]) / tokens


def _name(candidate: Candidate) -> str:
  m = candidate.mesh
  mesh = f"mesh {m.data} x {m.fsdp} x {m.fsdp_inner} x {m.tensor}"
  return f"{mesh}, batch {candidate.batch}, {candidate.policy}"

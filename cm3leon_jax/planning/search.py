"""Which mesh, batch and remat policy fit a topology, and which of them is the fastest."""

from collections.abc import Callable, Iterator
import dataclasses
import math

from cm3leon_jax.config import UserError
from cm3leon_jax.mesh import MeshConfig, create_mesh
from cm3leon_jax.models.transformer import KEPT
from cm3leon_jax.planning.topology import Topology

POLICIES = (
  "minimal",
  "save_qkv",
  "save_attention",
  "offload",
  "full",
)  # From the least recomputation to the most.
BATCHES = (
  16,
  8,
  4,
  2,
  1,
)  # Rows of a device, the largest first: more rows share one gather of the parameters.


@dataclasses.dataclass(frozen=True)
class Candidate:
  """What the search varies. batch: rows of a device and pass; the accumulation steps make up the global batch."""

  mesh: MeshConfig
  batch: int
  policy: str

  def apply(self, settings, topology: Topology):
    """`settings` with this mesh, policy and batch, the global batch as it was.

    Raises:
      UserError: the global batch is not a multiple of what the devices take in one pass.
    """
    mesh = self.mesh
    one_pass = self.batch * len(topology.devices) // mesh.tensor
    rows = settings.train.global_batch_size
    if rows % one_pass:
      raise UserError(
        f"config.train.global_batch_size is {rows}; {one_pass} rows, which the devices take at once, must divide it."
      )
    train = dataclasses.replace(settings.train, gradient_accumulation_steps=rows // one_pass)
    return dataclasses.replace(
      settings,
      mesh=mesh,
      model=dataclasses.replace(settings.model, remat_policy=self.policy),
      train=train,
    )

  def flags(self, settings, topology: Topology) -> str:
    """Flags of `launch.train` that select it."""
    train, mesh = self.apply(settings, topology).train, dataclasses.asdict(self.mesh)
    parts = [f"--config.mesh.{axis}={n}" for axis, n in mesh.items()]
    parts += [f"--config.train.gradient_accumulation_steps={train.gradient_accumulation_steps}"]
    return " ".join([*parts, f"--config.model.remat_policy={self.policy}"])


def meshes(topology: Topology) -> Iterator[MeshConfig]:
  """Meshes whose axes are dimensions of the torus: fsdp over all of them, or over some and tensor over one.

  Slices lie along `data`. Of a torus of three dimensions the two first make one axis.
  """
  torus = [n for n in topology.torus if n > 1] or [1]
  outer, inner = math.prod(torus[:-1]), torus[-1]
  yield MeshConfig(topology.slices, outer, 1, inner)
  for tensor in (2, 4):
    if inner % tensor == 0 and tensor <= inner:
      yield MeshConfig(topology.slices, outer, tensor, inner // tensor)


def kept_bytes(model, tokens: int, policy: str) -> int:
  """Bytes of a device that a policy keeps for the backward pass, at least: layer inputs and the values that it names."""
  widths = {
    "qkv": 3,
    "attention": 1,
    "middle": 1,
    "mlp": (2 if model.family == "modern" else 1) * model.mlp_width / model.width,
  }
  kept = 1 + sum(widths[name] for name in KEPT.get(policy, ()))
  return int(
    kept * tokens * model.width * model.num_layers * (2 if model.dtype == "bfloat16" else 4)
  )


def search(
  settings, topology: Topology, compile_one: Callable, tell: Callable[[str], None]
) -> list[dict]:
  """Compiles candidates; for each mesh and batch only the policy that recomputes least among those that fit.

  Args:
    settings: of the config.
    topology: what to compile for.
    compile_one: (settings, mesh) -> report of `compile_report`; raises UserError if it does not fit.
    tell: gets a line for each candidate that was tried.

  Returns:
    Reports of those that fit, with `candidate` and `flags`, the fastest first: by the least time of a token, whichever
    of products and collectives is the longer, then by the compiler's cycles.
  """
  found = []
  for config in meshes(topology):
    mesh = create_mesh(config, topology.devices)
    for batch in BATCHES:
      for policy in POLICIES:
        candidate = Candidate(config, batch, policy)
        try:
          changed = candidate.apply(settings, topology)
        except UserError as error:
          tell(f"{_name(candidate)}: {error}")
          break
        tokens = batch * settings.data.sequence_length
        if kept_bytes(settings.model, tokens, policy) // config.tensor > topology.chip.hbm * 2**30:
          continue
        try:
          report = compile_one(changed, mesh)
        except UserError as error:
          tell(f"{_name(candidate)}: {error}")
          continue
        tell(
          f"{_name(candidate)}: {report['sum_gib']:.2f} GiB, {cost(report) * 1e6:.3f} us a token and device at least"
        )
        found.append(
          {
            **report,
            "candidate": dataclasses.asdict(candidate),
            "flags": candidate.flags(settings, topology),
          }
        )
        break
  return sorted(found, key=lambda r: (round(cost(r), 9), r["cycles"] * r["devices"] / r["tokens"]))


def cost(report: dict) -> float:
  """Least seconds that a device needs for one of its tokens."""
  tokens = report["tokens"] / report["devices"]
  return max(report["compute_seconds"], report["collective_seconds"]) / tokens


def _name(candidate: Candidate) -> str:
  mesh = candidate.mesh
  return f"mesh {mesh.data} x {mesh.fsdp} x {mesh.fsdp_inner} x {mesh.tensor}, batch {candidate.batch}, {candidate.policy}"

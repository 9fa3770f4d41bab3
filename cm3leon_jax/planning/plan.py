"""Plans a run: mesh, memory, time and checkpoints of a config on given hardware."""

from collections.abc import Iterator, Mapping
import dataclasses
import math

import jax

from cm3leon_jax.config.settings import Settings
from cm3leon_jax.config.training import on_mesh
from cm3leon_jax.errors import UserError
from cm3leon_jax.mesh import BATCH, FSDP, MeshConfig, create_mesh
from cm3leon_jax.models import transformer
from cm3leon_jax.models.transformer import KEPT
from cm3leon_jax.planning import memory, mesh_prices, utilization
from cm3leon_jax.planning.hardware import Hardware, peak_of
from cm3leon_jax.training.steps import compile_steps
from cm3leon_jax.training.watch.flops import hardware_flops, model_flops

GIB = 2**30
GRACE_SECONDS = 900
SPOT_SECONDS = 30  # Seconds between Google Cloud's notice and the preemption of a machine.
# Tokens per second of one core (docs/benchmarks.md): planning rows, and reading them.
PLANNED, READ = 88_000_000, 6_000_000


@dataclasses.dataclass(frozen=True)
class Plan:
  """Numbers of a planned run.

  Attributes:
    flags: flags of `cm3leon train` for the settings that differ from the config.
    rows_per_device: rows per device in one pass.
    passes: passes (micro-batches) per step.
    rows: rows per step, over all devices.
    tokens_per_step: tokens per step, over all devices.
    mfu: assumed share of the peak FLOP/s, as measured or given; the stages before training use it.
    mfu_source: says which measurement `mfu` is from; "" if a user gave it.
    step_mfu: `mfu` with the remat policy of the run, see planning/utilization.py.
    step_seconds: seconds per step at `step_mfu`, if it is not checked.
    faster: what would also fit into the memory and takes less time, with its flags; or "".
    cheaper: (the plan's mesh at its best, a cheaper one), see planning/mesh_prices.py; or None.
    replay_every: a step is checked (computed twice) if its number is a multiple of `replay_every`;
      0 means never.
    checkpoint_bytes: bytes of parameters and optimizer state.
    saving_hosts: number of hosts that write a checkpoint.
    save_bandwidth: bytes per second that each host writes.
  """

  hardware: Hardware
  mesh: dict[str, int]
  flags: tuple[str, ...]
  remat_policy: str
  rows_per_device: int
  passes: int
  rows: int
  memory: memory.Memory
  parameters: int
  tokens: int
  tokens_per_step: int
  mfu: float
  mfu_source: str
  step_mfu: float
  step_seconds: float
  replay_every: int
  checkpoint_bytes: int
  saving_hosts: int
  save_bandwidth: float
  eval_batches: int
  faster: str
  cheaper: tuple[mesh_prices.Option, mesh_prices.Option] | None

  @property
  def mean_step_seconds(self) -> float:
    """Average seconds per step. Checked steps take twice as long as others."""
    return self.step_seconds * (1 + (1 / self.replay_every if self.replay_every else 0))

  @property
  def tokens_per_second(self) -> float:
    """Tokens per second of all devices."""
    return self.tokens_per_step / self.mean_step_seconds

  @property
  def rows_per_second(self) -> tuple[float, float]:
    """Rows per second that a host needs, and that one of its cores plans and reads.

    A core plans the rows of all hosts, and reads the rows of its host.
    """
    length, hosts = self.tokens_per_step // self.rows, self.hardware.hosts
    given = 1 / (length * (hosts / PLANNED + 1 / READ))
    return self.tokens_per_second / length / hosts, given

  @property
  def days(self) -> float:
    """Days to train on the config's tokens, without evaluation, saving and restarts."""
    return self.tokens / self.tokens_per_second / 86_400

  @property
  def chip_hours(self) -> float:
    return self.days * 24 * self.hardware.chips

  @property
  def save_seconds(self) -> float:
    """Seconds to write a checkpoint, which is also the time to read it back for its digests."""
    return self.checkpoint_bytes / self.saving_hosts / self.save_bandwidth

  @property
  def stop_seconds(self) -> float:
    """Seconds from SIGTERM to the end of the process. docs/pods.md lists the parts.

    The hosts need two steps to agree on a last step. Then they compute a held-out loss, whose
    forward passes take a third of a step each. In the worst case, they write two checkpoints, one
    of which was already in progress, and read both for their digests.
    """
    return (2 + self.eval_batches / 3) * self.step_seconds + 4 * self.save_seconds

  @property
  def grace_seconds(self) -> int:
    """Seconds that a launcher allows for saving: 10% more than needed, and at least 900."""
    return max(GRACE_SECONDS, 300 * math.ceil(1.1 * self.stop_seconds / 300))


def make(settings: Settings, hardware: Hardware, mfu: float | None, bandwidth: float) -> Plan:
  """Plans a run of a config on given hardware.

  Uses the mesh of the config, or, if all mesh fields have their defaults, a mesh that follows the
  torus. If the config's rows do not fit into the memory of a device, chooses fewer rows per pass or
  a remat policy that keeps less. `mfu` is the assumed model FLOPs utilization of the run; None:
  that of the nearest published measurement, for the run's remat policy. `bandwidth` is the GB/s at
  which each host writes to storage.

  Raises:
    UserError: the mesh does not fit the hardware or the batch, or no settings fit into the memory.
  """
  settings, mesh, flags, estimated = _fitting(settings, hardware)
  shards = math.prod(n for axis, n in mesh.items() if axis != "tensor")
  train = on_mesh(settings.train, shards)
  length = settings.data.sequence_length
  tokens = train.global_batch_size * length
  peak = peak_of(hardware.device_kind) * hardware.devices
  parameters, checkpoint = _state(settings)
  measured = utilization.nearest(hardware.platform, hardware.chip, parameters)
  source = f"as {measured.source}, {measured.mfu:.0%} with remat like `{measured.remat}`"
  sizes = length, settings.tuned
  step_mfu = mfu or measured.mfu_of(settings.model, *sizes)
  step_seconds = model_flops(settings.model, tokens, *sizes) / (peak * step_mfu)
  return Plan(
    hardware=hardware,
    mesh=mesh,
    flags=flags,
    remat_policy=settings.model.remat_policy,
    rows_per_device=estimated.rows,
    passes=train.gradient_accumulation_steps,
    rows=train.global_batch_size,
    memory=estimated,
    parameters=parameters,
    tokens=tokens * train.steps,
    tokens_per_step=tokens,
    mfu=mfu or measured.mfu,
    mfu_source="" if mfu else source,
    step_mfu=step_mfu,
    step_seconds=step_seconds,
    replay_every=train.replay_every,
    checkpoint_bytes=checkpoint,
    saving_hosts=_saving_hosts(settings, mesh, hardware),
    save_bandwidth=bandwidth * 1e9,
    eval_batches=train.eval_batches,
    faster=_faster(settings, mesh, hardware),
    cheaper=mesh_prices.cheaper(settings, mesh, hardware, step_seconds),
  )


def _faster(settings: Settings, shape: dict[str, int], hardware: Hardware) -> str:
  """Says which lighter remat policy, or else how many more rows per pass, fit too; "" if none."""
  row = 1, settings.data.sequence_length, settings.tuned
  result: list[tuple[Settings, str, str]] = []
  for policy in reversed(KEPT):  # The policy that computes least again is the first.
    model = dataclasses.replace(settings.model, remat_policy=policy)
    gain = 1 - hardware_flops(model, *row) / hardware_flops(settings.model, *row)
    if gain > 0:
      text = f"{gain:.0%} less time: --config.model.remat_policy={policy}"
      result.append((dataclasses.replace(settings, model=model), f"`{policy}` fits", text))
  now = memory.estimate(settings, shape, hardware.platform).rows
  rows = settings.train.global_batch_size // math.prod(shape[axis] for axis in BATCH)
  for n in (n for n in range(rows, now, -1) if rows % n == 0):
    other, flags = memory.with_rows(settings, n)
    text = f"parameters are gathered {rows // n} instead of {rows // now} times a step: "
    result.append((other, f"{n} rows in a pass fit", text + " ".join(flags)))
  for other, what, text in result:
    total = memory.estimate(other, shape, hardware.platform).total / GIB
    if total <= hardware.memory:
      return f"{what} too ({total:.1f} of {hardware.memory:.1f} GiB), {text}"
  return ""


def _fitting(
  settings: Settings, hardware: Hardware
) -> tuple[Settings, dict[str, int], tuple[str, ...], memory.Memory]:
  """Returns settings that fit, mesh axis sizes, the flags for both, and the memory needed."""
  chosen = settings.mesh == MeshConfig()
  candidates = meshes(hardware) if chosen else [settings.mesh]
  limit, failure = hardware.memory * GIB, ""
  for config in candidates:
    shape = _shape(config, hardware)
    flags = [f"--config.mesh.{axis}={n}" for axis, n in shape.items()] if chosen else []
    estimated = memory.estimate(settings, shape, hardware.platform)
    if estimated.total <= limit:
      return settings, shape, tuple(flags), estimated
    if not failure:
      failure = f"{memory.excess(settings, estimated, limit)}: take more devices."
    for other, more in memory.smaller(settings, shape, hardware.platform):
      estimated = memory.estimate(other, shape, hardware.platform)
      if estimated.total <= limit:
        return other, shape, (*flags, *more.split()), estimated
  raise UserError(f"{hardware}: {failure}")


def meshes(hardware: Hardware) -> Iterator[MeshConfig]:
  """Yields meshes whose axes follow the torus, with `tensor` of size 1, 2 and 4.

  `data` spans the slices. `fsdp_inner` and `tensor` together span the last dimension of the torus,
  and the devices of a chip if it has several. `fsdp` spans the other dimensions. For GPUs, `data`
  spans hosts and `fsdp` the GPUs of a host.
  """
  if hardware.platform == "gpu":
    yield MeshConfig(hardware.slices, hardware.per_host, 1, 1)
    return
  torus = [n for n in hardware.torus if n > 1] or [1]
  outer, inner = math.prod(torus[:-1]), torus[-1] * hardware.devices_per_chip
  yield MeshConfig(hardware.slices, outer, 1, inner)
  for tensor in (2, 4):
    if inner % tensor == 0 and tensor <= inner:
      yield MeshConfig(hardware.slices, outer, tensor, inner // tensor)


def _shape(config: MeshConfig, hardware: Hardware) -> dict[str, int]:
  try:
    shape = config.over(hardware.devices)
  except ValueError as error:
    raise UserError(f"config.mesh: {error}") from error
  if shape["data"] % hardware.slices:
    what = "slices" if hardware.platform == "tpu" else "hosts"
    raise UserError(
      f"config.mesh.data is {shape['data']}; it must be a multiple of {hardware.slices}, the "
      f"number of {what}."
    )
  return shape


def _saving_hosts(settings: Settings, shape: Mapping[str, int], hardware: Hardware) -> int:
  """Returns how many hosts write a checkpoint.

  All do, because Orbax divides an axis of each shard among its replicas. If neither the layers nor
  the parts of the width are a multiple of the replicas, the hosts of one replica write everything.
  """
  data, fsdp = shape["data"], math.prod(shape[axis] for axis in FSDP)
  shared = any(n % data == 0 for n in (settings.model.num_layers, settings.model.width // fsdp))
  return hardware.hosts if shared else max(1, hardware.hosts // data)


def _state(settings: Settings) -> tuple[int, int]:
  """Returns (number of parameters, bytes of a checkpoint)."""
  single = create_mesh(MeshConfig(1, 1, 1, 1), jax.devices()[:1])
  with jax.set_mesh(single):
    sections = settings.model, settings.optimizer, settings.train, settings.vocab, settings.seed
    state = jax.eval_shape(compile_steps(*sections, settings.tuned).init)
    key = jax.random.key(0)
    params = jax.eval_shape(lambda: transformer.init_params(settings.model, key))
  parameters = transformer.count_params(params)
  return parameters, sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))


def table(plan: Plan, title: str, spot: bool = False) -> str:
  """Formats a plan, one number and its assumptions per line.

  `title` begins the first line. `spot` says whether the machines may be preempted at any time.
  """
  hw, gb = plan.hardware, plan.checkpoint_bytes / 1e9
  passes = f"in {plan.passes} passes" if plan.passes > 1 else "in one pass"
  source = f" ({plan.mfu_source}; --mfu=SHARE gives another)" if plan.mfu_source else ""
  hosts = f"{gb / plan.saving_hosts:.2f} on each of {plan.saving_hosts:,} hosts"
  if plan.saving_hosts == 1:
    hosts = "all on 1 host"
  checked = ""
  if plan.replay_every:
    checked = f"; {plan.mean_step_seconds:,.1f} s on average, checked steps included"
  short = f"; spot machines give about {SPOT_SECONDS} s" if spot else ""
  rows = {
    "mesh": ", ".join(f"{axis} {n}" for axis, n in plan.mesh.items()),
    "remat": plan.remat_policy,
    "rows of a device": f"{plan.rows_per_device} in a pass; a step has {plan.rows:,} {passes}",
    "memory of a device": f"about {plan.memory} of {hw.memory:.2f}{hw.share}",
    "model": f"{plan.parameters:,} parameters",
    "a step": f"{plan.tokens_per_step:,} tokens, {plan.step_seconds:,.1f} s at "
    f"{plan.step_mfu:.0%} of the peak{source}{checked}",
    "tokens/s": f"{plan.tokens_per_second:,.0f}, "
    f"{plan.tokens_per_second / hw.devices:,.0f} a device",
    "the run": f"{plan.tokens:.3g} tokens in {plan.days:,.1f} days, {plan.chip_hours:,.0f} "
    f"{'GPU' if hw.platform == 'gpu' else 'chip'}-hours, without evaluation, saving and restarts",
    "a checkpoint": f"{gb:,.2f} GB, {hosts}: {plan.save_seconds:,.0f} s to write and as long to "
    f"read for digests, at {plan.save_bandwidth / 1e9:g} GB/s a host",
    "time to stop": f"{plan.stop_seconds:,.0f} s from SIGTERM to the end; launchers give "
    f"{plan.grace_seconds:,} s{short}",
  }
  needed, given = plan.rows_per_second
  late = "" if needed < given else ": too few, the devices will wait for rows"
  rows["rows of a host"] = f"{needed:,.1f} rows/s needed; one core gives {given:,.1f}{late}"
  if plan.faster:
    rows["faster"] = plan.faster
  if plan.cheaper:
    now, best = plan.cheaper
    hours = plan.tokens / plan.tokens_per_step * hw.chips / 3600
    rows["cheaper mesh"] = (
      f"{best.seconds * hours:,.0f} chip-hours, collectives included, with "
      f"{' '.join(best.flags)}; this mesh {now.seconds * hours:,.0f} at best, with "
      f"{' '.join(now.flags[len(now.shape) :])}"
    )
  if plan.flags:
    rows["flags"] = " ".join(plan.flags)
  return "\n".join([f"{title} on {hw}", *(f"  {name:<20}{text}" for name, text in rows.items())])

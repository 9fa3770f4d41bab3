"""Reports the costs of a compiled program on one device, as numbers and as a table."""

from collections.abc import Iterator
import time

import jax

from cm3leon_jax.errors import UserError
from cm3leon_jax.planning.hardware import peak_of
from cm3leon_jax.planning.hlo import Program
from cm3leon_jax.planning.topology import Topology

GIB = 2**30
LARGEST = 8


def compile_for(
  lowered: jax.stages.Lowered, topology: Topology
) -> tuple[jax.stages.Compiled, float]:
  """Compiles a program for a topology. Returns the program and the seconds that this took.

  Raises:
    UserError: the program needs more memory than the chip has. XLA does not check this for GPUs.
  """
  start = time.perf_counter()
  try:
    compiled = lowered.compile(dict(topology.chip.options))
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    reason = str(error).splitlines()[0]
    raise UserError(f"{topology.name}: the program does not fit: {reason}") from error
  return compiled, time.perf_counter() - start


def _check_fits(needed: float, topology: Topology) -> None:
  if topology.share and needed > topology.chip.hbm:
    raise UserError(
      f"{topology.name}: the program does not fit: it needs {needed:.2f} GiB per device, of "
      f"{topology.chip.hbm:.2f}{topology.share}."
    )


def compile_report(lowered: jax.stages.Lowered, topology: Topology) -> dict:
  """Compiles a program and returns its `report`. Raises UserError like `compile_for`."""
  return report(*compile_for(lowered, topology), topology)


def report(compiled: jax.stages.Compiled, seconds: float, topology: Topology) -> dict:
  """Returns the numbers for `table`. Loops whose end depends on data count as one iteration."""
  memory, program = compiled.memory_analysis(), Program(compiled.as_text())
  arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
  flops, collectives = program.flops(), program.collectives()
  hbm, links = topology.chip.hbm, topology.chip.ici_bandwidth
  _check_fits((arguments + temporaries) / GIB, topology)
  peak = peak_of(topology.devices[0].device_kind)
  sent = sum(moved * (2 if kind == "all-reduce" else 1) for kind, (_, moved) in collectives.items())
  return {
    "devices": len(topology.devices),
    "device_kind": topology.devices[0].device_kind,
    "arguments_gib": arguments / GIB,
    "temporaries_gib": temporaries / GIB,
    "sum_gib": (arguments + temporaries) / GIB,
    "peak_gib": memory.peak_memory_in_bytes / GIB,
    "host_gib": memory.host_temp_size_in_bytes / GIB,
    "hbm_gib": hbm,
    "share": topology.share,
    "flops": flops,
    "traffic": program.traffic(),
    "cycles": program.cycles(),
    "collectives": {kind: {"count": n, "bytes": moved} for kind, (n, moved) in collectives.items()},
    "compute_seconds": flops / peak,
    "collective_seconds": sent / links if links else None,
    "largest": program.largest(LARGEST),
    "compile_seconds": seconds,
  }


def table(title: str, report: dict) -> str:
  """Formats the result of `report`, one number per line."""
  lines = [title, *(f"  {name:<20} {text}" for name, text in _rows(report))]
  return "\n".join(lines)


def _rows(r: dict) -> Iterator[tuple[str, str]]:
  if "parameters" in r:
    yield "parameters", f"{r['parameters']:,}"
  if "tokens" in r:
    model, ratio = r["model_flops"], r["flops"] * r["devices"] / r["model_flops"]
    yield "tokens per step", f"{r['tokens']:,}, {r['tokens'] // r['devices']:,} per device"
    yield "model FLOPs", f"{model:.3e} per step, {model / r['devices']:.3e} per device"
    yield "FLOPs executed", f"{r['flops']:.3e} per device, {ratio:.3f} x model FLOPs"
  else:
    yield "FLOPs", f"{r['flops']:.3e} per device"
  arrays = f"arguments {r['arguments_gib']:.2f} + temporaries {r['temporaries_gib']:.2f}"
  total = f"{r['sum_gib']:.2f} GiB of {r['hbm_gib']:.2f}{r['share']}"
  rest = f"peak {r['peak_gib']:.2f}; in host memory {r['host_gib']:.2f}"
  yield "memory of a device", f"{arrays} = {total}; {rest}"
  products = f"products {r['compute_seconds']:.3f} s at peak FLOP/s"
  seconds = r["collective_seconds"]
  moved = "collectives unknown: the compiler knows no links, and autotuned nothing"
  if seconds is not None:
    moved = f"collectives {seconds:.3f} s over all links"
  yield "least time", f"{products}; {moved}"
  yield from r.get("floor", {}).items()
  for kind, c in r["collectives"].items():
    yield kind, f"{c['count']:,} x, {c['bytes'] / GIB:.2f} GiB"
  for i, x in enumerate(r["largest"]):
    text = f"{x['bytes'] / GIB:6.2f} GiB  {x['array']:<24} {x['source']}"
    yield "" if i else "largest arrays", text
  yield "compilation", f"{r['compile_seconds']:.0f} s"

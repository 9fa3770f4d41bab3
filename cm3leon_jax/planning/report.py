"""What a compiled program costs on one device, as numbers and as a table."""

import re
import time

import jax

from cm3leon_jax.config import UserError
from cm3leon_jax.planning.hlo import Program
from cm3leon_jax.planning.topology import Topology
from cm3leon_jax.training.flops import device_peak

GIB = 2**30
LARGEST = 8


def compile_for(
  lowered: jax.stages.Lowered, topology: Topology
) -> tuple[jax.stages.Compiled, float]:
  """The program, compiled for `topology`, and the seconds that it took.

  Raises:
    UserError: the program needs more than the chip's memory.
  """
  start = time.perf_counter()
  try:
    compiled = lowered.compile(dict(topology.chip.options))
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    needed = re.search(r"\(([\d.]+)G\) exceeds available HBM \(([\d.]+)G\)", str(error))
    told = (
      f"temporaries of {needed[1]} GiB, {needed[2]} are there"
      if needed
      else str(error).splitlines()[0]
    )
    raise UserError(f"{topology.name}: the program does not fit: {told}.") from error
  return compiled, time.perf_counter() - start


def compile_report(lowered: jax.stages.Lowered, topology: Topology) -> dict:
  """Compiles for `topology`; returns the numbers of the table. Raises as `compile_for`."""
  return report(*compile_for(lowered, topology), topology)


def report(compiled: jax.stages.Compiled, seconds: float, topology: Topology) -> dict:
  """The numbers of the table. What a loop does whose end depends on data counts once."""
  memory, program = compiled.memory_analysis(), Program(compiled.as_text())
  arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
  flops, collectives = program.flops(), program.collectives()
  peak = device_peak(topology.devices[0].device_kind)
  sent = sum(moved * (2 if kind == "all-reduce" else 1) for kind, (_, moved) in collectives.items())
  return {
    "devices": len(topology.devices),
    "device_kind": topology.devices[0].device_kind,
    "arguments_gib": arguments / GIB,
    "temporaries_gib": temporaries / GIB,
    "sum_gib": (arguments + temporaries) / GIB,
    "peak_gib": memory.peak_memory_in_bytes / GIB,
    "host_gib": memory.host_temp_size_in_bytes / GIB,
    "hbm_gib": topology.chip.hbm,
    "flops": flops,
    "traffic": program.traffic(),
    "cycles": program.cycles(),
    "collectives": {kind: {"count": n, "bytes": moved} for kind, (n, moved) in collectives.items()},
    "compute_seconds": flops / peak,
    "collective_seconds": sent / topology.chip.ici_bandwidth,
    "largest": program.largest(LARGEST),
    "compile_seconds": seconds,
  }


def table(title: str, report: dict) -> str:
  """The report as text, one number a line; see `compile_report`."""
  r = report
  lines = [title]
  row = lambda name, text: lines.append(f"  {name:<20} {text}")
  if "parameters" in r:
    row("parameters", f"{r['parameters']:,}")
  if "tokens" in r:
    row("tokens a step", f"{r['tokens']:,}, {r['tokens'] // r['devices']:,} a device")
    row(
      "model FLOPs",
      f"{r['model_flops']:.3e} a step, {r['model_flops'] / r['devices']:.3e} a device",
    )
    row(
      "FLOPs executed",
      f"{r['flops']:.3e} a device, {r['flops'] * r['devices'] / r['model_flops']:.3f} x model FLOPs",
    )
  else:
    row("FLOPs", f"{r['flops']:.3e} a device")
  row(
    "memory of a device",
    f"arguments {r['arguments_gib']:.2f} + temporaries {r['temporaries_gib']:.2f} = {r['sum_gib']:.2f} GiB of "
    f"{r['hbm_gib']:.2f}; peak {r['peak_gib']:.2f}; in the host's {r['host_gib']:.2f}",
  )
  row(
    "least time",
    f"products {r['compute_seconds']:.3f} s at the peak; collectives {r['collective_seconds']:.3f} s at all links",
  )
  for name, value in r.get("floor", {}).items():
    row(name, value)
  for kind, c in r["collectives"].items():
    row(kind, f"{c['count']:,} x, {c['bytes'] / GIB:.2f} GiB")
  for i, x in enumerate(r["largest"]):
    row(
      "" if i else "largest arrays", f"{x['bytes'] / GIB:6.2f} GiB  {x['array']:<24} {x['source']}"
    )
  row("compiled in", f"{r['compile_seconds']:.0f} s")
  return "\n".join(lines)

"""Compiles train steps for TPU slices; prints the tables of memory and times in docs/scaling.md.

  python -m benchmarks.pod_memory --part=goals
  python -m benchmarks.pod_memory --part=sizes
  python -m benchmarks.pod_memory --part=tuning

A compilation takes half a minute and needs no TPU.
"""

import json
import pathlib
import subprocess
import sys
import tempfile

from absl import app, flags

_PART = flags.DEFINE_enum("part", "sizes", ["goals", "sizes", "tuning"], "Table to print.")

MESHES = {"v5e-256": (16, 16), "v6e-256": (16, 16), "v5p-256": (16, 8), "v5p-8": (2, 2)}
# (Model size, TPU slice, rows per device, remat policy).
GOALS = [
  ("7b", "v5p-256", 4, "full"),
  ("7b", "v5e-256", 2, "full"),
  ("7b", "v6e-256", 4, "full"),
  ("7b", "v5p-8", 4, "full"),
  ("7b", "v5p-8", 4, "minimal"),
  ("7b", "v5e-256", 4, "full"),
  ("7b", "v5e-256", 4, "offload"),
  ("7b", "v5e-256", 4, "save_attention"),
]
SIZES = [
  ("350m", "v5e-256", 4, "minimal"),
  ("350m", "v6e-256", 8, "minimal"),
  ("350m", "v5p-256", 32, "minimal"),
  ("350m", "v5p-8", 32, "minimal"),
  ("760m", "v5e-256", 2, "minimal"),
  ("760m", "v6e-256", 4, "minimal"),
  ("760m", "v5p-256", 16, "minimal"),
  ("760m", "v5p-8", 16, "minimal"),
]
# Instruction tuning: (model size, TPU slice, rows per device, remat policy, micro-batches).
TUNING = [
  ("7b", "v5p-256", 4, "full", 1),
  ("7b", "v5e-256", 2, "full", 1),
  ("7b", "v6e-256", 2, "full", 1),
  ("7b", "v5p-8", 4, "full", 32),
  ("350m", "v5e-256", 2, "minimal", 1),
  ("350m", "v6e-256", 2, "minimal", 1),
  ("350m", "v5p-256", 4, "minimal", 1),
  ("350m", "v5p-8", 32, "minimal", 4),
  ("760m", "v5e-256", 2, "minimal", 1),
  ("760m", "v6e-256", 2, "minimal", 1),
  ("760m", "v5p-256", 4, "minimal", 1),
  ("760m", "v5p-8", 16, "minimal", 8),
]


def measure(size: str, topology: str, rows: int, policy: str, passes: int = 0) -> dict:
  """Returns the report of `aot_compile` for a train step; exits with its error if it fails.

  If `passes` is given, the step belongs to instruction tuning, with its config's batch size.
  """
  outer, inner = MESHES[topology]
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "report.json"
    command = [
      sys.executable,
      "-m",
      "launch.aot_compile",
      f"--config=ml_configs/{'sft' if passes else 'cm3leon'}_{size}.py",
      f"--topology={topology}",
    ]
    command += [f"--config.mesh.fsdp={outer}", f"--config.mesh.fsdp_inner={inner}"]
    batch = f"--config.train.rows_per_device={rows}"
    command.append(batch if passes else f"--batch_per_device={rows}")
    command += [f"--config.model.remat_policy={policy}", f"--json={path}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
      sys.exit(f"{' '.join(command)}:\n{result.stderr[-1_000:]}")
    return json.loads(path.read_text())["train"]


def row(size: str, topology: str, rows: int, policy: str, passes: int = 0) -> str:
  """Returns a table row."""
  r = measure(size, topology, rows, policy, passes)
  again = r["flops"] * r["devices"] / r["model_flops"]
  tokens = r["tokens"] / r["devices"]
  moved = " / ".join(
    f"{r['collectives'][kind]['bytes'] / 2**30:.2f}"
    for kind in ("all-gather", "reduce-scatter", "all-reduce")
  )
  memory = f"{r['arguments_gib']:.2f} + {r['temporaries_gib']:.2f} = **{r['sum_gib']:.2f}**"
  memory += f" of {r['hbm_gib']:.2f}"
  if r["host_gib"] > 0.01:
    memory += f"; host {r['host_gib']:.2f}"
  times = f"{r['compute_seconds'] / tokens * 1e6:.2f}; {r['collective_seconds'] / tokens * 1e6:.2f}"
  where = f"{topology} | {f'{rows} x {passes}' if passes > 1 else rows} | {policy}"
  return f"| {size} | {where} | {memory} | {again:.3f} | {times} | {moved} |"


def main(_) -> None:
  print(
    "| size | slice | rows per device | remat | GiB | FLOPs / model FLOPs "
    "| µs per token: products; collectives | GiB a device |"
  )
  print("|---|---|---|---|---|---|---|---|")
  parts: dict[str, list[tuple]] = {"goals": GOALS, "sizes": SIZES, "tuning": TUNING}
  for arguments in parts[_PART.value]:
    print(row(*arguments), flush=True)


if __name__ == "__main__":
  app.run(main)

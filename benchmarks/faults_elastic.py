"""Part `elastic` of `benchmarks.faults`: changes the number of processes of a run.

- Loader schedules: 1 to 4 processes with random meshes read the rows of a run as training does, but
  do not train. Together they must read every row, each equal to the row that a single process
  reads.
- Training schedules: trainings are stopped, and a different number of processes continues them.
  Their losses are compared with those of a training in one process.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import pathlib
import shutil
import socket
from typing import Any

import numpy as np

from benchmarks import faults_kill, faults_run
from benchmarks.faults_run import Process
from cm3leon_jax.files.json_files import read_json, write_json

CONFIG = f"{faults_run.CONFIG}:elastic"
BATCH = 12  # Rows per batch; divides evenly among 1, 2, 3 or 4 processes.
# Number of processes -> (devices per process, sizes of the axes data, fsdp and tensor).
MESHES = {
  1: ((1, (1, 1, 1)), (2, (2, 1, 1)), (2, (1, 1, 2)), (4, (1, 2, 2))),
  2: ((1, (2, 1, 1)), (1, (1, 2, 1)), (2, (1, 2, 2)), (2, (2, 1, 2)), (3, (6, 1, 1))),
  3: ((1, (3, 1, 1)), (2, (3, 1, 2)), (2, (3, 2, 1)), (4, (3, 2, 2))),
  4: ((1, (2, 2, 1)), (1, (4, 1, 1)), (1, (1, 2, 2)), (3, (6, 2, 1)), (3, (3, 2, 2))),
}
DOWN_AND_UP = (4, 2, 3, 1, 3, 2, 4)
TRAIN_SCHEDULES = 2


@dataclasses.dataclass(frozen=True)
class Segment:
  """Part of a run in which the number of processes stays the same.

  Attributes:
    processes: number of processes.
    devices: number of devices per process.
    mesh: sizes of the axes data, fsdp and tensor.
    batches: number of batches to read.
  """

  processes: int
  devices: int
  mesh: tuple[int, int, int]
  batches: int

  @property
  def flags(self) -> tuple[str, ...]:
    """Command-line flags that set the mesh."""
    sizes = zip(("data", "fsdp", "tensor"), self.mesh)
    return tuple(f"--config.mesh.{axis}={size}" for axis, size in sizes)


def schedule(seed: int, number: int) -> list[Segment]:
  """Draws 4 to 8 segments. In schedule 0, `DOWN_AND_UP` lists their numbers of processes."""
  rng = np.random.default_rng([seed, number])
  counts = DOWN_AND_UP if number == 0 else rng.integers(1, 5, rng.integers(4, 9)).tolist()
  segments = []
  for processes in counts:
    devices, mesh = MESHES[processes][rng.integers(len(MESHES[processes]))]
    segments.append(Segment(processes, devices, mesh, int(rng.integers(1, 9))))
  return segments


def free_port() -> int:
  """Returns a free port number."""
  with contextlib.closing(socket.socket()) as s:
    s.bind(("localhost", 0))
    return s.getsockname()[1]


def row_hashes(batch: dict, first_row: int) -> dict[int, str]:
  """Hashes all fields of each row of a batch, for the rows on the devices of this process.

  Returns:
    Row number -> hash; several hashes if this process has unequal copies of the row.
  """
  copies: dict[tuple[int, int], Any] = {}  # (row, device) -> hash.
  for name in sorted(batch):
    for shard in batch[name].addressable_shards:
      numbers = range(*shard.index[0].indices(batch[name].shape[0]))
      for r, row in zip(numbers, np.asarray(shard.data)):
        copy = copies.setdefault((first_row + r, shard.device.id), hashlib.sha256())
        copy.update(name.encode() + row.tobytes())
  rows: dict[int, set[str]] = {}
  for (row, _), copy in copies.items():
    rows.setdefault(row, set()).add(copy.hexdigest())
  return {row: " and ".join(sorted(hashes)) for row, hashes in rows.items()}


def read_rows(workdir, out, segment: Segment, address: str, process: int, next_row: int) -> None:
  """Reads the batches of a segment in one of its processes; writes the hashes of rows to `out`."""
  import jax
  from jax.sharding import NamedSharding

  from cm3leon_jax import distributed
  from cm3leon_jax.commands import common
  from cm3leon_jax.data.rows.loader import batches
  from cm3leon_jax.mesh import MeshConfig, spec
  from cm3leon_jax.trained import rows as training_rows

  if segment.processes > 1:
    distributed.initialize(address, segment.processes, process, 60)
  data, fsdp, tensor = segment.mesh
  settings = faults_run.settings_of(CONFIG)
  settings = dataclasses.replace(settings, mesh=MeshConfig(data=data, fsdp=fsdp, tensor=tensor))
  with common.use_mesh(settings):
    loader = training_rows.open_rows(settings, workdir, "train", write_starts=process == 0)
    sharding = NamedSharding(jax.sharding.get_mesh(), spec("batch", "length"))
    read: dict[int, str] = {}
    for i, batch in enumerate(
      itertools.islice(batches(loader, next_row, BATCH, sharding), segment.batches)
    ):
      read |= row_hashes(batch, next_row + i * BATCH)
  out.write_text(json.dumps(read))


def read_segment(root: pathlib.Path, workdir, segment: Segment, next_row: int) -> dict[int, str]:
  """Starts the processes of a segment, and collects the hashes that they write.

  Returns:
    Row number -> hash; several hashes if the processes read different rows under this number.
  """
  address = f"localhost:{free_port()}"
  outs = [root / f"process_{i}" / "rows.json" for i in range(segment.processes)]
  processes = []
  for i, out in enumerate(outs):
    arguments = (read_rows, workdir, out, segment, address, i, next_row)
    processes.append(Process.function(out.parent, *arguments, devices=segment.devices))
  rows: dict[int, set[str]] = {}
  for process, out in zip(processes, outs):
    faults_run.finish(process)
    for row, value in json.loads(out.read_text()).items():
      rows.setdefault(int(row), set()).add(value)
  return {row: " and ".join(sorted(values)) for row, values in rows.items()}


def new_workdir(root: pathlib.Path, name: str) -> pathlib.Path:
  """Creates the folder of a run, with links to the stages that all runs share."""
  if not (root / "shared" / "made.json").exists():
    shutil.rmtree(root / "shared", ignore_errors=True)
    faults_run.make_workdir(root / "shared", CONFIG)
    write_json(root / "shared" / "made.json", {})
  return faults_kill.new_run(root, name)


def compare(found: dict[int, str], expected: dict[int, str]) -> dict[str, int]:
  """Counts rows that were read, missed, surplus, or different from the rows of a single process."""
  shared = found.keys() & expected.keys()
  return {
    "rows": len(found),
    "lost": len(expected.keys() - found.keys()),
    "surplus": len(found.keys() - expected.keys()),
    "different": sum(found[row] != expected[row] for row in shared),
  }


def loader_schedule(root: pathlib.Path, seed: int, number: int, expected: dict) -> dict:
  """Reads the rows of a schedule. As a negative control, schedule 0 reads its last segment twice,
  the second time one row late."""
  workdir, next_row, found = new_workdir(root, f"loader_{number:02d}"), 0, {}
  segments = schedule(seed, number)
  for segment in segments:
    found |= read_segment(workdir, workdir, segment, next_row)
    next_row += segment.batches * BATCH
  result = {
    "schedule": [[s.processes, *s.mesh, s.batches] for s in segments],
    **compare(found, {row: expected[row] for row in range(next_row)}),
  }
  if number == 0:
    last = segments[-1]
    start = next_row - last.batches * BATCH
    late = read_segment(workdir, workdir, last, start + 1)
    shifted = {row - 1: value for row, value in late.items()}
    result["control"] = compare(shifted, {r: expected[r] for r in range(start, next_row)})
  shutil.rmtree(workdir)
  return result


def _expected_rows(root: pathlib.Path, rows: int) -> dict[int, str]:
  """Returns the hashes of the rows that one process reads without being stopped."""
  path = root / "rows.json"
  if not path.exists():
    whole = Segment(1, 1, (1, 1, 1), math.ceil(rows / BATCH))
    workdir = new_workdir(root, "whole")
    write_json(path, read_segment(workdir, workdir, whole, 0))
  return {int(row): value for row, value in read_json(path).items()}


def losses_of(workdir: pathlib.Path) -> dict[int, float]:
  """Returns the loss of every step. Raises ValueError if a step is logged twice."""
  lines = [line for line in faults_run.logged(workdir) if "loss" in line]
  losses = {line["step"]: line["loss"] for line in lines}
  if len(losses) != len(lines):
    raise ValueError(f"{workdir}: a step is logged twice.")
  return losses


def train_segment(root: pathlib.Path, segment: Segment, until: int | None) -> None:
  """Trains with the processes of a segment; stops them with SIGTERM when step `until` is logged."""
  address, processes = f"localhost:{free_port()}", []
  for i in range(segment.processes):
    join: tuple[str, ...] = ()
    if segment.processes > 1:
      join = (f"--coordinator_address={address}", f"--num_processes={segment.processes}")
      join = (*join, f"--process_id={i}")
    options = {"workdir": root, "config": CONFIG, "devices": segment.devices}
    folder = root / f"process_{i}"
    processes.append(Process.command(folder, "train", *segment.flags, *join, **options))
  while until is not None and processes[0].wait(faults_run.POLL_SECONDS) is None:
    if faults_run.last_step(root) >= until:
      processes[-1].terminate()
      break
  for process in processes:
    if process.wait() not in (0, 75):
      raise RuntimeError(f"{process.folder}: {process.wait()}:\n{process.log[-3000:]}")


def train_schedule(root: pathlib.Path, seed: int, number: int) -> dict:
  """Trains a run with changing numbers of processes and one in one process; compares losses."""
  steps = faults_run.settings_of(CONFIG).train.steps
  whole = root / "train_whole"
  if not (whole / "train" / "done.json").exists():
    new_workdir(root, whole.name)
    train_segment(whole, Segment(1, 1, (1, 1, 1), steps), None)
  rng, workdir = np.random.default_rng([seed, 100 + number]), new_workdir(root, f"train_{number}")
  stops, used = [], []
  for i, processes in enumerate(DOWN_AND_UP):
    fitting = [m for m in MESHES[processes] if math.prod(m[1]) <= 4 and m[1][:2] != (3, 2)]
    segment = Segment(processes, *fitting[rng.integers(len(fitting))], 0)
    last = i + 1 == len(DOWN_AND_UP)
    begin = faults_run.last_step(workdir)
    train_segment(workdir, segment, None if last else begin + int(rng.integers(1, 3)))
    stops.append(faults_run.last_step(workdir))
    used.append([processes, *segment.mesh])
  found, expected = losses_of(workdir), losses_of(whole)
  same_steps = found.keys() == expected.keys()
  shared = sorted(found.keys() & expected.keys())
  later = [abs(found[s] - expected[s + 1]) for s in shared[:-1] if s + 1 in expected]
  return {
    "schedule": used,
    "stops": stops,
    "same_steps": same_steps,
    "largest_difference": max(abs(found[step] - expected[step]) for step in shared),
    "control": min(later),  # Smallest difference between the losses of consecutive steps.
  }


def measure(root: pathlib.Path, seed: int, count: int) -> Iterator[dict]:
  """Yields the results of `count` loader schedules, then of the training schedules."""
  root = root / "elastic"
  schedules = [schedule(seed, number) for number in range(count)]
  rows = max(sum(s.batches for s in segments) for segments in schedules) * BATCH
  for number in range(count):
    path = root / f"loader_{number:02d}.json"
    if not path.exists():
      write_json(path, loader_schedule(root, seed, number, _expected_rows(root, rows)))
    yield read_json(path)
  for number in range(min(TRAIN_SCHEDULES, count)):
    path = root / f"train_{number}.json"
    if not path.exists():
      write_json(path, train_schedule(root, seed, number))
    yield read_json(path)


def summarize(results: list[dict]) -> dict:
  """Adds up the counts of rows, and finds the largest difference between losses."""
  loader = [result for result in results if "rows" in result]
  trained = [result for result in results if "largest_difference" in result]
  totals = {name: sum(r[name] for r in loader) for name in ("rows", "lost", "surplus", "different")}
  changes = sum(len(result["schedule"]) - 1 for result in loader)
  return {
    "schedules": len(loader),
    "changes": changes,
    **totals,
    "control": next((result["control"] for result in loader if "control" in result), None),
    "trained": len(trained),
    "largest_difference": max((r["largest_difference"] for r in trained), default=None),
    "same_steps": all(result["same_steps"] for result in trained),
    "train_control": min((result["control"] for result in trained), default=None),
  }

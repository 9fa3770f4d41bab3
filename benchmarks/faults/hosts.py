"""Kills a training and continues it on other numbers of hosts: does any row or loss change?

  python -m benchmarks.faults.hosts --workdir=workdir/hosts

Each host is a process with one fake device. The rows are packed, from pairs with neighbors and from
texts, and a phase changes the mixture at step 120. Runs of 200 steps:
  undisturbed  four hosts; the phase is in the config from the beginning
  killed       four hosts, killed before step 120 and before step 122
  moved        four hosts, killed before step 120; the phase is added; one host, killed before step
               122; three hosts
Each host records the digest of every row that a step gets. Prints a table. The exit code is 1 if a
row differs, if a loss of `killed` differs at all, or one of `moved` by more than 1e-5.
"""

from collections.abc import Iterator
import hashlib
import os
import pathlib
import runpy
import shutil
import signal
import socket
import sys
from typing import NamedTuple

from absl import app, flags
import numpy as np

from benchmarks.faults import processes
from cm3leon_jax.files.json_files import read_json_lines
from cm3leon_jax.training import objective

STEPS, BATCH, CHANGE = 200, 12, 120
PHASE = f"--config.data.phases=(({CHANGE * BATCH}, {{'text_share': 0.7, 'num_neighbors': 0}}),)"
FLAGS = [
  *(f"--config={processes.CONFIG}", f"--config.train.steps={STEPS}"),
  *(f"--config.train.global_batch_size={BATCH}", "--config.train.checkpoint_every=7"),
  *("--config.train.eval_every=100", "--config.train.sample_every=1000"),
  *("--config.mesh.data=-1", "--config.mesh.fsdp=1"),
]
TOLERANCE = 1e-5


class Part(NamedTuple):
  """Steps of a run on a number of hosts, which are killed before the step `killed_before`."""

  hosts: int
  killed_before: int = STEPS + 1
  flags: tuple[str, ...] = (PHASE,)


RUNS = {
  "undisturbed": (Part(4),),
  "killed": (Part(4, CHANGE), Part(4, CHANGE + 2), Part(4)),
  "moved": (
    Part(4, CHANGE, ()),
    Part(1, CHANGE + 2, (PHASE, "--allow_changed=data.phases")),
    Part(3),
  ),
}


def _recorded(batches: Iterator, first: int, path: pathlib.Path, killed_before: int) -> Iterator:
  """Yields batches and writes the number and digest of this host's rows; ends the process."""
  with path.open("a") as file:
    for j, batch in enumerate(batches):
      begin = first + j * BATCH
      if begin >= (killed_before - 1) * BATCH:
        os.kill(os.getpid(), signal.SIGKILL)
      for shards in zip(*(batch[name].addressable_shards for name in sorted(batch))):
        for r, row in enumerate(range(*shards[0].index[0].indices(BATCH))):
          content = b"".join(np.asarray(shard.data)[r].tobytes() for shard in shards)
          file.write(
            f'{{"row": {begin + row}, "digest": "{hashlib.sha256(content).hexdigest()}"}}\n'
          )
      file.flush()
      yield batch


def _train(folder: pathlib.Path, host: int, port: int, part: Part) -> None:
  """Trains as `cm3leon train` on one host of several."""
  batches = objective.RowObjective.batches
  path = folder / f"rows_{host}.jsonl"
  objective.RowObjective.batches = lambda self, first, rows: _recorded(
    batches(self, first, rows), first, path, part.killed_before
  )
  job = [f"--coordinator_address=localhost:{port}", f"--num_processes={part.hosts}"]
  sys.argv = ["launch.train", *FLAGS, f"--workdir={folder}", *part.flags]
  sys.argv += [*job, f"--process_id={host}"] if part.hosts > 1 else []
  runpy.run_module("launch.train", run_name="__main__", alter_sys=True)


def train(folder: pathlib.Path, part: Part) -> None:
  """Trains a part of a run. Raises RuntimeError if a host ends in another way than expected."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  hosts = [
    processes.Process.function(folder, _train, folder, host, port, part)
    for host in range(part.hosts)
  ]
  expected = -signal.SIGKILL if part.killed_before <= STEPS else 0
  codes = [host.wait() for host in hosts]
  if codes != [expected] * part.hosts:
    raise RuntimeError(f"{folder}: exit codes {codes}:\n{hosts[0].log[-3000:]}")


def rows_of(folder: pathlib.Path) -> dict[int, set[str]]:
  """Returns the digests of each row that a step of a run read, on any host, at any time."""
  rows: dict[int, set[str]] = {}
  for path in folder.glob("rows_*.jsonl"):
    for line in read_json_lines(path):
      rows.setdefault(line["row"], set()).add(line["digest"])
  return rows


def losses_of(folder: pathlib.Path) -> np.ndarray:
  """Returns the logged loss of each step, [STEPS]."""
  found = {line["step"]: line["loss"] for line in processes.logged(folder) if "loss" in line}
  return np.array([found[step] for step in range(1, STEPS + 1)])


def main(argv: list[str]) -> None:
  """Trains all runs and prints the table."""
  del argv
  root = pathlib.Path(flags.FLAGS.workdir).resolve()
  shutil.rmtree(root, ignore_errors=True)
  processes.make_workdir(root / "stages")
  rows, losses, failed = {}, {}, False
  print("| run | hosts | rows | other rows | largest difference of a loss |\n|---|---|---|---|---|")
  for name, parts in RUNS.items():
    folder = root / name
    shutil.copytree(root / "stages", folder)
    for part in parts:
      train(folder, part)
    rows[name], losses[name] = rows_of(folder), losses_of(folder)
    known = rows["undisturbed"]
    other = sum(rows[name].get(i) != known[i] for i in range(STEPS * BATCH))
    shifted = sum(known[i] == known[i + 1] for i in range(STEPS * BATCH - 1))
    difference = float(np.abs(losses[name] - losses["undisturbed"]).max())
    failed |= bool(other or shifted) or difference > (TOLERANCE if name == "moved" else 0)
    hosts = ", ".join(str(part.hosts) for part in parts)
    print(f"| {name} | {hosts} | {len(rows[name]):,} | {other} | {difference:.1e} |", flush=True)
  sys.exit(int(failed))


if __name__ == "__main__":
  flags.DEFINE_string("workdir", "workdir/hosts", "Folder of all runs; it is deleted first.")
  app.run(main)

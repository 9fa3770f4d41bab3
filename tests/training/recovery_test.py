"""Two processes of a run decide the same about its checkpoints."""

import os
import subprocess
import sys

from tests.distributed_test import free_port

# Saves steps 1 to 5, damages 5, unseals 4, leaves digests of 7, and goes back to what is whole,
# then to step 2.
PROCESS = """
import pathlib, sys
import numpy as np
from cm3leon_jax import distributed
from cm3leon_jax.training import recovery
from cm3leon_jax.training.checkpoint import Checkpoints
folder = pathlib.Path(sys.argv[3])
# Libraries write to the process's standard output at any time, in the middle of a line, too.
sys.stdout = open(sys.argv[4], "w", encoding="utf-8")
distributed.initialize(sys.argv[1], 2, int(sys.argv[2]), 60)
digests = folder / "checkpoints.digests"
with Checkpoints(folder, keep=9) as checkpoints:
  for step in range(1, 6):
    checkpoints.save({"w": np.full(1_000, step, np.float32)}, step, next_row=step)
  checkpoints.wait()
  with distributed.together():
    if distributed.is_first():
      (digests / "5.json").write_text('{"a": "b"}')
      (digests / "4.json").unlink()
      (digests / "7.json").write_text("{}")
  found = [recovery.newest_whole(checkpoints)]
  recovery.discard_unsealed(checkpoints)
  found.append(checkpoints.steps())
  distributed.print_once(sorted(path.stem for path in digests.iterdir()))
  recovery.go_back(checkpoints, 2)
  found += [checkpoints.steps(), recovery.newest_whole(checkpoints)]
  print(found)
"""


def test_two_processes_go_back_together(tmp_path):
  address, jobs = f"localhost:{free_port()}", []
  folder, printed = tmp_path / "run", [tmp_path / "first", tmp_path / "second"]
  for i in range(2):
    command = [sys.executable, "-c", PROCESS, address, str(i), str(folder), str(printed[i])]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    jobs.append(subprocess.Popen(command, env=dict(os.environ), **pipes))
  found = [job.communicate(timeout=300) for job in jobs]
  assert [job.returncode for job in jobs] == [0, 0], found
  first, second = (path.read_text("utf-8").splitlines() for path in printed)
  assert first[-1] == second[-1] == "[3, [1, 2, 3], [1, 2], 2]"
  lines = (
    "warning: checkpoint 7 is gone from ",
    f"warning: {folder}/checkpoints/5/",
    "warning: checkpoint 4 in ",
    "['1', '2', '3', '7']",
  )
  assert len(first) == len(lines) + 1
  for line, start in zip(first, lines):
    assert line.startswith(start)
  assert len(second) == 1
  names = {path.name for path in (folder / "checkpoints.digests").iterdir()}
  assert names == {"1.json", "2.json"}

import json

import numpy as np
import pytest

from benchmarks.faults import processes
from cm3leon_jax.training.faults import replay
from cm3leon_jax.training.faults.replay import Replay
from tests.distributed_test import free_port
from tests.training.faults.flips import KINDS, REPLICAS, Trainer

compute = Replay._compute


def misread(stage):
  """Returns a fake of `Replay._compute` that flips one bit in the fingerprint of `stage`."""

  def computed(self, number, *args):
    state, metrics, prints = compute(self, number, *args)
    if number == 0:
      damaged = prints[stage].copy()
      damaged[0] ^= 1
      prints = {**prints, stage: damaged}
    return state, metrics, prints

  return computed


def trials_of_process(out, address, process):
  """Runs all trials as one of two processes. Both flip the same bits, because seeds are equal."""
  from cm3leon_jax import distributed

  distributed.initialize(address, 2, process, 120)
  trainer = Trainer((2, 2, 1), 1)
  kinds = ["none", *KINDS, *KINDS, *REPLICAS, *REPLICAS]
  results = [trainer.trial(kind, np.random.default_rng([3, i])) for i, kind in enumerate(kinds)]
  with pytest.MonkeyPatch.context() as patch:
    for stage, kind in (("gradients", "gradients"), ("read", "none")):
      if process == 1:
        patch.setattr(Replay, "_compute", misread(stage))
      results.append(trainer.trial(kind, np.random.default_rng([3, len(kinds)])))
    patch.undo()
    if process == 1:
      patch.setattr(replay, "different_replicas", lambda *args: ([0], [3]))
    results.append(trainer.trial("none", np.random.default_rng([3, len(kinds)])))
  out.write_text(json.dumps(results))


@pytest.mark.slow
def test_a_flip_in_one_of_two_processes_is_named_by_both(tmp_path):
  address, jobs = f"localhost:{free_port()}", []
  for i in range(2):
    arguments = (trials_of_process, tmp_path / f"{i}.json", address, i)
    jobs.append(processes.Process.function(tmp_path / f"process_{i}", *arguments, devices=2))
  for job in jobs:
    processes.finish(job)
  results = [json.loads((tmp_path / f"{i}.json").read_text()) for i in range(2)]
  # The processes agree in every trial, even if one of them read a damaged fingerprint.
  assert results[0] == results[1]
  *results, changed, apart = results[0]
  assert "step 5 reads: step, params.blocks.down" in changed["sentence"]
  assert "step 5 reads replicas that are not equal" in apart["sentence"]
  assert len(results) == 14
  for found in results:
    # Rounding in unchecked steps may remove a flip of one replica, so that nothing is to be found.
    vanished = found["kind"] in REPLICAS and not found["found"] and found["recovered"]
    assert found["named"] is (found["kind"] != "none" and not vanished), found
    assert found["recovered"] is not False, found
  named = " ".join(result["sentence"] for result in results)
  assert "of process 0 on" in named
  assert "of process 1 on" in named

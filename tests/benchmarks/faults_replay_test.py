import json

import numpy as np
import pytest

from benchmarks import faults_replay, faults_run, faults_table
from benchmarks.faults_elastic import free_port
from benchmarks.faults_replay import KINDS, REPLICAS
from cm3leon_jax.training.faults import replay
from cm3leon_jax.training.faults.replay import Replay

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
  trainer = faults_replay.Trainer((2, 2, 1), 1)
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
  address, processes = f"localhost:{free_port()}", []
  for i in range(2):
    arguments = (trials_of_process, tmp_path / f"{i}.json", address, i)
    processes.append(faults_run.Process.function(tmp_path / f"process_{i}", *arguments, devices=2))
  for process in processes:
    faults_run.finish(process)
  results = [json.loads((tmp_path / f"{i}.json").read_text()) for i in range(2)]
  # The processes agree in every trial, even if one of them read a damaged fingerprint.
  assert results[0] == results[1]
  *results, changed, apart = results[0]
  assert "step 5 reads: step, params.blocks.down" in changed["sentence"]
  assert "step 5 reads replicas that are not equal" in apart["sentence"]
  summary = faults_replay.summarize(results)
  assert faults_table.replay_failures(summary) == []
  assert (summary["flips"], summary["clean"]) == (13, 1)
  named = " ".join(result["sentence"] for result in results)
  assert "of process 0 on" in named
  assert "of process 1 on" in named


def result(kind, found=True, named=True, recovered=True):
  return {"kind": kind, "found": found, "named": named, "recovered": recovered}


def test_a_flip_that_is_not_found_or_a_false_alarm_fails():
  fine = [result(kind) for kind in (*KINDS, *REPLICAS)] + [result("none", False, False)]
  summary = faults_replay.summarize(fine)
  assert faults_table.replay_failures(summary) == []
  assert faults_table.markdown({"replay": summary}).splitlines()[2] == (
    "| `replay_every`: bit flip in parameters, moments, gradients, updates, one replica of "
    "parameters, one replica of moments | 1 each | 1 found, 1 named | 1 recovered | 0 | 0 | - |"
  )
  for wrong in (
    result("updates", found=False, named=False, recovered=False),
    result("moments", named=False),
    result("gradients", recovered=False),
    result(REPLICAS[0], found=False, named=False, recovered=False),
    result("none", found=True),
    result("none", found=False, recovered=False),
  ):
    assert faults_table.replay_failures(faults_replay.summarize([*fine, wrong]))
  # Rounding may remove a flip between two checked steps; then there is nothing to find.
  vanished = faults_replay.summarize([*fine, result(REPLICAS[0], found=False, named=False)])
  assert faults_table.replay_failures(vanished) == []
  assert vanished["kinds"][REPLICAS[0]]["vanished"] == 1

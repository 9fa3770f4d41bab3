"""Tests the counts and comparisons of `benchmarks.faults`. Only the slow tests inject faults."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from benchmarks.faults import damage, kill, processes, table
from benchmarks.faults.damage import Fault, compare
from cm3leon_jax.files.json_files import read_json

ROOT = pathlib.Path(__file__).parents[2]


def write_run(folder, losses, next_row=8):
  metrics = folder / "train" / "metrics"
  metrics.mkdir(parents=True)
  lines = [{"step": i + 1, "loss": x, "time": 9.5 + i} for i, x in enumerate(losses)]
  lines.append({"step": 2, "heldout_loss": 3.0, "goodput_step": 0.1})
  (metrics / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  summary = {"summary": {"next_row": next_row}}
  (folder / "train" / "done.json").write_text(json.dumps(summary))
  (folder / "train" / "samples").mkdir()
  (folder / "train" / "samples" / "step_000002.png").write_bytes(b"png")
  return processes.result_of(folder)


def test_results_differ_in_the_last_bit_of_a_loss_and_not_in_times(tmp_path):
  first = write_run(tmp_path / "a", [1.0, 2.0])
  (tmp_path / "b" / "train").mkdir(parents=True)
  assert processes.differing(write_run(tmp_path / "c", [1.0, 2.0]), first) == []
  late = write_run(tmp_path / "d", [1.0, float(np.nextafter(2.0, 3.0))])
  assert processes.differing(late, first) == ["losses"]
  twice = write_run(tmp_path / "e", [1.0, 2.0, 2.0])
  assert processes.differing(twice, first) == ["losses"]
  assert processes.differing(write_run(tmp_path / "f", [1.0, 2.0], 9), first) == ["rows"]
  (tmp_path / "c" / "train" / "samples" / "step_000002.png").unlink()
  assert processes.differing(processes.result_of(tmp_path / "c"), first) == ["samples"]


@pytest.mark.parametrize(
  ("hit", "step", "same", "outcome", "lost"),
  [
    (1, 20, True, "went back", 10),
    (1, 20, False, "wrong", 10),  # The restored arrays differ from the saved ones.
    (1, 30, True, "harmless", 0),
    (1, 30, False, "wrong", 0),
    (1, 10, True, "wrong", 20),  # The run lost more steps than necessary.
    (1, None, True, "wrong", 0),
    (2, 10, True, "went back", 20),
    (3, None, True, "refused", 0),
    (3, 0, False, "wrong", 30),  # The run restarted from step 0 without a message.
    (0, 30, True, "harmless", 0),
  ],
)
def test_what_a_run_did_after_a_fault_is_checked(hit, step, same, outcome, lost):
  fault = Fault("bit flip", (30, 20, 10), hit, ("checkpoints/30",))
  found = compare(fault, step, same, "checkpoints/30/a is damaged")
  assert (found["outcome"], found["steps_lost"], found["named"]) == (outcome, lost, True)
  assert not compare(fault, step, same, "checkpoints/20/a is damaged")["named"]


def make_checkpoints(train):
  for step in (10, 20, 30):
    folder = train / "checkpoints" / str(step) / "state"
    folder.mkdir(parents=True)
    for i in range(3):
      (folder / f"{i}").write_bytes(bytes(range(50 + i)))
  (train / "checkpoints.digests").mkdir()
  for step in (10, 20, 30):
    (train / "checkpoints.digests" / f"{step}.json").write_text("{}")


def content(folder):
  return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("kind", damage.KINDS[:-1])
def test_every_fault_changes_the_checkpoints_that_it_says_and_no_other(kind, tmp_path):
  for seed in range(5):
    train = tmp_path / f"{seed}"
    make_checkpoints(train)
    before = content(train)
    fault = damage.damage(train, kind, np.random.default_rng(seed))
    after = content(train)
    changed = {name for name in {*before, *after} if before.get(name) != after.get(name)}
    hit = {step for step in fault.steps if any(f"/{step}" in f"/{name}" for name in changed)}
    assert hit == set(fault.steps[: fault.hit])


def killed(saving=False, last=5, sealed=4, seconds=1.5, command="train"):
  return {"command": command, "saving": saving, "last_step": last, "sealed": sealed,
          "seconds_to_resume": seconds}  # fmt: skip


KILLS = [killed(), killed(True, 9, 4), killed(command="export")]
RUN = {"run": 0, "kills": KILLS, "differing": [], "replayed": 6, "replayed_equal": 6}


def test_kills_are_counted_and_a_difference_fails():
  summary = kill.summarize([{"differing": ["losses"]}, RUN])
  assert (summary["kills"], summary["saving"]) == (3, 1)
  assert summary["steps_lost"] == {"most": 5, "mean": 2.33}
  assert table.kill_failures(summary) == []
  wrong = kill.summarize([{"differing": []}, {**RUN, "differing": ["samples"]}])
  assert [s.split(" ")[0] for s in table.kill_failures(wrong)] == ["run", "the"]


def test_a_fault_without_a_message_or_with_a_wrong_end_fails():
  fine = {"kind": "bit flip", "outcome": "went back", "named": True, "steps_lost": 10}
  control = {"trials": 10, "wrong": 7}
  assert table.failures(damage.summarize([control, fine])) == []
  silent = damage.summarize([control, fine, {**fine, "named": False}])
  assert table.failures(silent) == ["bit flip: 1 of 2 had no message"]
  wrong = damage.summarize([{"trials": 10, "wrong": 0}, {**fine, "outcome": "wrong"}])
  assert len(table.failures(wrong)) == 2


def run_part(workdir, part: str, count: int) -> dict:
  command = [sys.executable, "-m", "benchmarks.faults", f"--part={part}", f"--workdir={workdir}"]
  result = subprocess.run(
    [*command, f"--count={count}"], cwd=ROOT, capture_output=True, text=True, check=False
  )
  assert result.returncode == 0, result.stdout + result.stderr
  return read_json(workdir / "results.json")[part]


@pytest.mark.slow
def test_a_run_that_was_killed_25_times_loses_nothing(tmp_path):
  found = run_part(tmp_path, "kill", 25)
  assert found["kills"] == 25
  assert found["runs_equal"] == found["runs"]
  assert found["control_differs"]
  assert found["replayed"] == found["replayed_equal"] > 0


@pytest.mark.slow
def test_damage_is_named_and_the_newest_whole_checkpoint_is_restored(tmp_path):
  found = run_part(tmp_path, "damage", 130)
  assert found["faults"] == 130
  assert found["control"]["wrong"] > 0
  assert sum(kind["wrong"] for kind in found["kinds"].values()) == 0

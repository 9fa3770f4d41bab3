"""Tests the counts and comparisons of `benchmarks.faults`. Only the slow tests inject faults."""

import faulthandler
import json
import pathlib
import threading

import numpy as np
import pytest

from benchmarks import (
  faults,
  faults_command,
  faults_damage,
  faults_elastic,
  faults_kill,
  faults_run,
  faults_stages,
  faults_table,
)
from benchmarks.faults_damage import Fault, compare

PACKAGE = "/anywhere/cm3leon_jax"
ROOT = pathlib.Path(faults.__file__).parents[1] / "cm3leon_jax"


def stacks(*main: tuple[str, str], other: str = "checkpoints/checkpoint.py") -> str:
  """Returns the stacks of two threads in the format of faulthandler, with the main thread last."""
  frames = [f'  File "{file}", line 7 in {function}' for file, function in main]
  first = f'Thread 0x00007f (most recent call first):\n  File "{PACKAGE}/{other}", line 5 in save\n'
  return "\n".join([first, "Current thread 0x00007e (most recent call first):", *frames, ""])


@pytest.mark.parametrize(
  ("frames", "phase"),
  [
    ([("training/loop.py", "run_steps")], "step"),
    ([("checkpoints/checkpoint.py", "wait"), ("training/loop.py", "run_steps")], "save"),
    ([("files/digests.py", "digest"), ("checkpoints/checkpoint.py", "seal")], "save"),
    (
      [("checkpoints/checkpoint.py", "damage"), ("training/decoder.py", "restore_or_init")],
      "restore",
    ),
    ([("training/watch/heldout.py", "evaluate"), ("training/loop.py", "run_steps")], "evaluate"),
    ([("generation/heldout.py", "generate_grid"), ("training/loop.py", "run_steps")], "sample"),
    ([("commands/common.py", "checked")], "start"),
  ],
)
def test_the_phase_of_a_kill_is_read_from_the_main_thread(frames, phase):
  assert faults_run.phase_of(stacks(*((f"{PACKAGE}/{f}", g) for f, g in frames))) == phase


def test_every_phase_names_a_function_of_the_package():
  names = [(file, function) for file, function, _ in faults_run.PHASES if function]
  for file, function in [*names, ("training/loop.py", "run_steps")]:
    assert f"\ndef {function}(" in (ROOT / file).read_text().replace("\n  def ", "\ndef ")


def test_tracing_in_a_step_is_a_phase_of_its_own():
  frames = [("/p/jax/_src/interpreters/partial_eval.py", "trace"), (f"{PACKAGE}/x.py", "run_steps")]
  assert faults_run.phase_of(stacks(*frames)) == "compile"


def test_the_main_thread_is_the_last_that_faulthandler_writes(tmp_path):
  """`phase_of` relies on this order."""
  inside, end = threading.Event(), threading.Event()

  def wait_in_another_thread():
    inside.set()
    end.wait(60)

  thread = threading.Thread(target=wait_in_another_thread)
  thread.start()
  inside.wait(60)
  with (tmp_path / "stacks").open("w") as file:
    faulthandler.dump_traceback(file, all_threads=True)
  end.set()
  thread.join()
  *others, main = (tmp_path / "stacks").read_text().split("\n\n")
  assert "test_the_main_thread_is_the_last" in main
  assert any("wait_in_another_thread" in stack for stack in others)


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
  return faults_run.result_of(folder)


def test_results_differ_in_the_last_bit_of_a_loss_and_not_in_times(tmp_path):
  first = write_run(tmp_path / "a", [1.0, 2.0])
  (tmp_path / "b" / "train").mkdir(parents=True)
  assert faults_run.differing(write_run(tmp_path / "c", [1.0, 2.0]), first) == []
  late = write_run(tmp_path / "d", [1.0, float(np.nextafter(2.0, 3.0))])
  assert faults_run.differing(late, first) == ["losses"]
  twice = write_run(tmp_path / "e", [1.0, 2.0, 2.0])
  assert faults_run.differing(twice, first) == ["losses"]
  assert faults_run.differing(write_run(tmp_path / "f", [1.0, 2.0], 9), first) == ["rows"]
  (tmp_path / "c" / "train" / "samples" / "step_000002.png").unlink()
  assert faults_run.differing(faults_run.result_of(tmp_path / "c"), first) == ["samples"]


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


@pytest.mark.parametrize("kind", faults_damage.KINDS[:-1])
def test_every_fault_changes_the_checkpoints_that_it_says_and_no_other(kind, tmp_path):
  for seed in range(5):
    train = tmp_path / f"{seed}"
    make_checkpoints(train)
    before = content(train)
    fault = faults_damage.damage(train, kind, np.random.default_rng(seed))
    after = content(train)
    changed = {name for name in {*before, *after} if before.get(name) != after.get(name)}
    hit = {step for step in fault.steps if any(f"/{step}" in f"/{name}" for name in changed)}
    assert hit == set(fault.steps[: fault.hit])


def test_the_command_meets_every_kind_and_then_the_frequent_ones_again():
  kinds = faults_command.order(25)
  assert {kind: kinds.count(kind) for kind in kinds} == faults_command.COUNTS
  assert kinds[:12] == list(faults_command.COUNTS)
  assert faults.PARTS["command"].count == sum(faults_command.COUNTS.values())


def test_all_meshes_of_a_schedule_can_split_a_batch():
  for processes, meshes in faults_elastic.MESHES.items():
    for devices, mesh in meshes:
      assert processes * devices == np.prod(mesh)
      assert faults_elastic.BATCH % (mesh[0] * mesh[1]) == 0
  counts = [segment.processes for segment in faults_elastic.schedule(0, 0)]
  assert counts == [4, 2, 3, 1, 3, 2, 4]
  assert faults_elastic.schedule(0, 1) == faults_elastic.schedule(0, 1)
  assert faults_elastic.schedule(0, 1) != faults_elastic.schedule(1, 1)


def test_rows_that_are_lost_repeated_or_changed_are_counted():
  expected = {0: "a", 1: "b", 2: "c"}
  same = {"rows": 3, "lost": 0, "surplus": 0, "different": 0}
  assert faults_elastic.compare(expected, expected) == same
  found = faults_elastic.compare({1: "b", 2: "c and d", 3: "e"}, expected)
  assert found == {"rows": 3, "lost": 1, "surplus": 1, "different": 1}


def kill(phase, saving=False, last=5, sealed=4, seconds=1.5, command="train"):
  return {"command": command, "phase": phase, "saving": saving, "last_step": last, "sealed": sealed,
          "seconds_to_resume": seconds}  # fmt: skip


KILLS = [kill("step"), kill("step", True, 9, 4), kill("start", command="export")]
RUN = {"run": 0, "kills": KILLS, "differing": [], "replayed": 6, "replayed_equal": 6}


def test_kills_are_counted_by_phase_and_a_difference_fails():
  summary = faults_kill.summarize([{"differing": ["losses"]}, RUN])
  assert summary["phases"] == {"cm3leon export": 1, "step": 1, "step, a save in flight": 1}
  assert summary["steps_lost"] == {"most": 5, "mean": 2.33}
  assert faults_table.kill_failures(summary) == []
  wrong = faults_kill.summarize([{"differing": []}, {**RUN, "differing": ["samples"]}])
  assert [s.split(" ")[0] for s in faults_table.kill_failures(wrong)] == ["run", "the"]


def test_a_fault_without_a_message_or_with_a_wrong_end_fails():
  fine = {"kind": "bit flip", "outcome": "went back", "named": True, "steps_lost": 10}
  control = {"trials": 10, "wrong": 7}
  assert faults_table.failures(faults_damage.summarize([control, fine])) == []
  silent = faults_damage.summarize([control, fine, {**fine, "named": False}])
  assert faults_table.failures(silent) == ["bit flip: 1 of 2 had no message"]
  wrong = faults_damage.summarize([{"trials": 10, "wrong": 0}, {**fine, "outcome": "wrong"}])
  assert len(faults_table.failures(wrong)) == 2


def test_the_table_says_which_part_of_a_part_was_run():
  numbers = {"kill": {"asked": 200, **faults_kill.summarize([{"differing": ["losses"]}, RUN])}}
  assert faults_table.markdown(numbers).splitlines()[2] == (
    "| SIGKILL | 3 of 200 | - | 1 of 1 runs | 5 logged, computed again | 0 | 1.5 (1.5 to 1.5) |"
  )


def test_rows_of_the_table_that_differ_only_in_the_fault_are_one():
  fine = {"kind": "bit flip", "outcome": "went back", "named": True, "steps_lost": 10}
  results = [fine, {**fine, "kind": "truncation"}, {**fine, "kind": "all gone", "steps_lost": 20}]
  command = {**faults_damage.summarize([{}, *results]), "seconds_to_resume": {}}
  assert faults_table.markdown({"command": command}).splitlines()[2:] == [
    "| `cm3leon train`: bit flip, truncation | 1 each | 1 of 1 | 1 went back | 10 | 0 | - |",
    "| `cm3leon train`: all gone | 1 | 1 of 1 | 1 went back | 20 | 0 | - |",
  ]


def test_files_of_stages_are_compared_without_times(tmp_path):
  results = []
  for name, time, loss in (("a", 1.0, 0.5), ("b", 2.0, 0.5), ("c", 1.0, 0.25)):
    folder = tmp_path / name
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "state").write_text(name)
    (folder / "params").write_text("same")
    lines = [{"step": 1, "loss": loss, "time": time}, {"step": 1, "goodput": time}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = {"seconds": time, "id": name, "files": {}, "summary": {"seconds": time, "steps": 1}}
    (folder / "done.json").write_text(json.dumps(done))
    results.append(faults_stages.result_of(folder))
  first, later, other = results
  assert first["done.json"] == {"files": {}, "summary": {"steps": 1}}
  assert faults_stages.differing(first, later) == []
  assert faults_stages.differing(first, other) == ["metrics.jsonl"]
  assert faults_stages.differing(first, {}) == ["done.json", "metrics.jsonl", "params"]


def test_a_stage_that_differs_after_a_kill_is_a_failure():
  runs = [
    {"differing": ["params"]},
    {"stage": "train_vqgan", "moments": [0.5, 1.0], "differing": []},
    {"stage": "train_vqgan", "moments": [], "differing": ["params"]},
  ]
  summary = {"asked": 2, **faults_stages.summarize(runs)}
  assert faults_stages.failures(summary) == ["train_vqgan: 1 of 2 runs differ in params"]
  summary["control_differs"] = False
  assert len(faults_stages.failures(summary)) == 2
  assert faults_table.markdown({"stages": summary}).splitlines()[2:] == [
    "| SIGKILL in `train_vqgan` | 2 | - | 1 of 2 runs | - | ? | - |"
  ]

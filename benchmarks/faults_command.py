"""Part `command` of `benchmarks.faults`: starts `cm3leon train` after damage to its workdir.

The training was killed after its third checkpoint. The next start must either reach the losses,
held-out losses and sample grids of a run that was never killed, or refuse to start with exit code 2
and leave the workdir unchanged.
"""

from collections.abc import Iterator
import itertools
import pathlib
import shutil

import numpy as np

from benchmarks import faults_damage, faults_kill, faults_run
from benchmarks.faults_damage import Fault
from cm3leon_jax.files.json_files import read_json, write_json

FULL, SAME_PATH = "disk full", "load path = save path"
COUNTS = {
  "bit flip": 3, "truncation": 2, "file missing": 2, "half an upload": 3, "digests missing": 2,
  "digests damaged": 2, "two newest damaged": 2, "two newest gone": 2, "all damaged": 1,
  "all gone": 1, SAME_PATH: 1, FULL: 4,
}  # fmt: skip
KEPT = 3
FLAGS = (f"--config.train.keep_checkpoints={KEPT}",)
# Keys of `faults_run.result_of` whose values depend only on the training.
PARTS = ("losses", "heldout", "rows", "samples")
DISK_ERRORS = ("File too large", "EFBIG", "No space left", "RESOURCE_EXHAUSTED")
REFUSED = 2


def order(count: int) -> list[str]:
  """Returns the kinds of `count` faults in rounds; a kind occurs at most COUNTS[kind] times."""
  rounds = itertools.chain.from_iterable(
    [kind for kind, most in COUNTS.items() if most > i] for i in range(max(COUNTS.values()))
  )
  return list(itertools.islice(rounds, count))


def prepare(root: pathlib.Path) -> pathlib.Path:
  """Kills a training after its third checkpoint, unless already done, and returns its folder."""
  folder = root / "killed"
  if not (root / "killed.json").exists():
    faults_kill.new_run(root, "killed")
    process = faults_run.Process.command(folder, "train", *FLAGS)
    while len(faults_run.sealed_steps(folder)) < KEPT:
      if process.wait(faults_run.POLL_SECONDS) is not None:
        raise RuntimeError(f"{folder}: the training ended:\n{process.log[-3000:]}")
    process.kill()
    sealed = {f"{step}" for step in faults_run.sealed_steps(folder)}
    for path in (folder / "train" / "checkpoints").iterdir():
      if path.name not in sealed:  # The kill interrupted this checkpoint's save.
        shutil.rmtree(path)
    write_json(root / "killed.json", {})
  return folder


def _seen(folder: pathlib.Path) -> dict:
  """Returns the files that a refused start must not change: name -> size."""
  train = folder / "train"
  files = [path for path in train.rglob("*") if path.is_file() and path.name != "lease.json"]
  return {str(path.relative_to(train)): path.stat().st_size for path in files}


def _damaged(folder: pathlib.Path, fault: Fault, flags: tuple[str, ...], expected: dict) -> dict:
  """Runs the command on a damaged workdir, and checks its result."""
  before = _seen(folder)
  process = faults_run.Process.command(folder, "train", *FLAGS, *flags)
  resumed = faults_kill.seconds_to_step(folder, process, fault.good or 0)
  code = process.wait()
  if code == REFUSED:
    unchanged = _seen(folder) == before and "error: " in process.log
    return {**faults_damage.compare(fault, None, True, process.log), "unchanged": unchanged}
  found = faults_run.result_of(folder)
  same = code == 0 and not faults_run.differing(found, expected)
  lines = [line for line in faults_run.logged(folder) if line.get("event") == "resumed"]
  step = lines[-1]["from_step"] if lines else 0
  return {**faults_damage.compare(fault, step, same, process.log), "seconds_to_resume": resumed}


def _full_disk(folder: pathlib.Path, rng: np.random.Generator, expected: dict) -> dict:
  """Runs the command on a full disk, then on a disk with free space, and checks both results."""
  largest = max(path.stat().st_size for path in faults_damage.files_of(folder / "train"))
  most = int(200 * (largest / 200) ** rng.random())
  process = faults_run.Process.command(folder, "train", *FLAGS, most_bytes=most)
  code, printed = process.wait(), process.log
  good = max(faults_run.sealed_steps(folder), default=0)
  lost = max(0, faults_run.last_step(folder) - good)
  process = faults_run.Process.command(folder, "train", *FLAGS)
  resumed = faults_kill.seconds_to_step(folder, process, good)
  found = {"done": process.wait() == 0, **faults_run.result_of(folder)}
  same = not faults_run.differing(found, {"done": True, **expected})
  named = code != 0 and any(text in printed for text in DISK_ERRORS)
  outcome = ("harmless" if code == 0 else "went back") if same else "wrong"
  result = {"kind": FULL, "outcome": outcome, "named": named, "steps_lost": lost}
  return {**result, "most_bytes": most, "code": code, "seconds_to_resume": resumed}


def _one(root: pathlib.Path, name: str, kind: str, rng, expected: dict) -> dict:
  folder = root / name
  shutil.rmtree(folder, ignore_errors=True)
  shutil.copytree(prepare(root), folder, symlinks=True)
  (folder / faults_run.LOG).unlink()
  if kind == FULL:
    result = _full_disk(folder, rng, expected)
  elif kind == SAME_PATH:
    steps = tuple(reversed(faults_run.sealed_steps(folder)))
    fault = Fault(kind, steps, len(steps), (f"--init_from is {folder}",))
    result = _damaged(folder, fault, (f"--init_from={folder}",), expected)
  else:
    result = _damaged(folder, faults_damage.damage(folder / "train", kind, rng), (), expected)
  if result["outcome"] != "wrong" and (result["named"] or result["outcome"] == "harmless"):
    shutil.rmtree(folder)
  return result


def measure(root: pathlib.Path, seed: int, count: int) -> Iterator[dict]:
  """Yields the result of each of `count` faults."""
  expected = {part: faults_kill.reference(root).result[part] for part in PARTS}
  for i, kind in enumerate(order(count)):
    path = root / f"fault_{i:02d}.json"
    if not path.exists():
      rng = np.random.default_rng([seed, i])
      write_json(path, _one(root, path.stem, kind, rng, expected))
    yield read_json(path)


def summarize(results: list[dict]) -> dict:
  """Counts the outcomes for each kind of fault."""
  summary = faults_damage.summarize([{}, *results])
  seconds = [r["seconds_to_resume"] for r in results if r.get("seconds_to_resume")]
  unchanged = all(result.get("unchanged", True) for result in results)
  return {**summary, "seconds_to_resume": faults_kill.spread(seconds), "unchanged": unchanged}

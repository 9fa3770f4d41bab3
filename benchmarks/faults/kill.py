"""Part `kill` of `benchmarks.faults`: kills three commands at random moments.

A run consists of `cm3leon train`, `evaluate` and `export`, and has a separate compilation cache.
The benchmark sends SIGKILL to its processes several times, and restarts them until the run is
finished. The losses, held-out losses, sample grids, evaluation and export must then equal those of
a run that was never killed.
"""

from collections.abc import Iterator
import dataclasses
import pathlib
import shutil
import statistics
import time

import numpy as np

from benchmarks.evidence import experiment
from benchmarks.faults import processes
from cm3leon_jax.files.json_files import read_json, write_json

SHARED = ("documents", "neighbors", "text_tokenizer", "vqgan")
# Maximum number of kills of each command per run. A command may end before its next kill.
KILLS = {"train": 12, "evaluate": 1, "export": 1}
STARTS = 60  # Maximum number of starts of a command.


@dataclasses.dataclass(frozen=True)
class Reference:
  """Results of a run that was never killed.

  Attributes:
    result: see `processes.result_of`.
    seconds: command -> its time in seconds.
    before_steps: seconds from the start of the training until its first step was logged.
  """

  result: dict
  seconds: dict[str, float]
  before_steps: float


def new_run(root: pathlib.Path, name: str) -> pathlib.Path:
  """Creates the folder of a run with links to the shared stages. Deletes an earlier folder."""
  shutil.rmtree(root / name, ignore_errors=True)
  experiment.link_stages(root / "shared", root / name, SHARED)
  return root / name


def reference(root: pathlib.Path) -> Reference:
  """Runs all commands without a kill in two runs, unless the result already exists.

  The second run finds its programs in the compilation cache, as a restarted run does, so its times
  are used. Raises RuntimeError if the results of the two runs differ.
  """
  path = root / "reference.json"
  if not path.exists():
    if not (root / "shared" / "made.json").exists():
      shutil.rmtree(root / "shared", ignore_errors=True)
      processes.make_workdir(root / "shared")
      write_json(root / "shared" / "made.json", {})
    cold, warm = new_run(root, "cold"), new_run(root, "warm")
    first = _without_kill(cold)
    shutil.copytree(cold / processes.CACHE, warm / processes.CACHE)
    second = _without_kill(warm)
    if differing := processes.differing(second["result"], first["result"]):
      raise RuntimeError(f"two runs without a kill differ in {', '.join(differing)}.")
    write_json(path, second)
  return Reference(**read_json(path))


def _without_kill(folder: pathlib.Path) -> dict:
  process = processes.Process.command(folder, "train")
  before = seconds_to_step(folder, process, 0)
  seconds = {"train": processes.finish(process)}
  for name in ("evaluate", "export"):
    seconds[name] = processes.finish(processes.Process.command(folder, name))
  result = processes.result_of(folder)
  return {"result": result, "seconds": seconds, "before_steps": before}


def seconds_to_step(
  folder: pathlib.Path, process: processes.Process, after: int, limit: float | None = None
) -> float | None:
  """Waits until a training process has logged a step after `after`.

  Returns:
    Seconds since the process started; None if it ended before, or ran for `limit` seconds.
  """
  path = folder / "train" / "metrics" / "metrics.jsonl"
  # An earlier start may have logged such steps. This start removes them when it opens the log.
  stamp = path.stat().st_mtime_ns if path.exists() else 0
  while process.wait(processes.POLL_SECONDS) is None:
    seconds = time.monotonic() - process.started
    if limit is not None and seconds > limit:
      return None
    is_new = path.exists() and path.stat().st_mtime_ns != stamp
    if is_new and processes.last_step(folder) > after:
      return round(seconds, 2)
  return None


def _moment(rng: np.random.Generator, command: str, known: Reference) -> tuple[bool, float]:
  """Draws the moment of a kill. Returns whether it counts from the first step, and the seconds.

  Half of the kills of a training happen before its first step. The other half happens within the
  first half of the time that all steps take, so that a training is killed several times.
  """
  after_step, share = bool(rng.random() < 0.5), float(rng.random())
  if command != "train":
    return False, share * known.seconds[command]
  if after_step:
    return True, share * (known.seconds[command] - known.before_steps) / 2
  return False, share * known.before_steps


def _kill_once(
  folder: pathlib.Path, command: str, rng: np.random.Generator, known: Reference
) -> dict | None:
  """Starts and kills a command. Returns a description of its state; None if it ended earlier."""
  after_step, delay = _moment(rng, command, known)
  start = max(processes.sealed_steps(folder), default=0)
  process = processes.Process.command(folder, command)
  resumed = None
  if command == "train":
    resumed = seconds_to_step(folder, process, start, None if after_step else delay)
  end = (time.monotonic() if after_step else process.started) + delay
  code = process.wait(end - time.monotonic())
  if code is not None or not process.kill():
    if process.wait() != 0:
      raise RuntimeError(f"{folder}: {command} failed:\n{process.log[-3000:]}")
    return None
  return {
    "command": command,
    "saving": command == "train" and processes.unfinished_save(folder),
    "last_step": processes.last_step(folder),
    "sealed": max(processes.sealed_steps(folder), default=0),
    "seconds_to_resume": resumed,
  }


def killed_run(root: pathlib.Path, seed: int, run: int, most: int, known: Reference) -> dict:
  """Runs all commands with up to `most` kills. Returns the kills and the names of wrong results."""
  rng, folder = np.random.default_rng([seed, run]), new_run(root, f"run_{run:03d}")
  kills: list[dict] = []
  for command, quota in KILLS.items():
    left, done = quota, False
    for _ in range(STARTS):
      if left and len(kills) < most:
        hit = _kill_once(folder, command, rng, known)
        if hit is not None:
          kills.append(hit)
          left -= 1
          continue
      else:
        processes.finish(processes.Process.command(folder, command))
      done = True
      break
    if not done:
      raise RuntimeError(f"{folder}: {command} is not done after {STARTS} starts.")
  differing = processes.differing(processes.result_of(folder), known.result)
  resumed = [line for line in processes.logged(folder) if line.get("event") == "resumed"]
  if not differing:
    shutil.rmtree(folder)
  return {
    "run": run,
    "kills": kills,
    "differing": differing,
    "replayed": sum(line["replayed"] for line in resumed),
    "replayed_equal": sum(line["identical"] for line in resumed),
  }


def control(root: pathlib.Path, known: Reference) -> dict:
  """Negative control: continues a killed run one row late, so that its results must differ."""
  folder = new_run(root, "control")
  process = processes.Process.command(folder, "train")
  while len(processes.sealed_steps(folder)) < 2 and process.wait(processes.POLL_SECONDS) is None:
    pass
  process.kill()
  processes.finish(processes.Process.function(folder, _shift_rows, folder))
  for command in KILLS:
    processes.finish(processes.Process.command(folder, command))
  found = processes.result_of(folder)
  return {"differing": processes.differing(found, known.result)}


def _shift_rows(folder: pathlib.Path) -> None:
  """Replaces the checkpoints of a run by a copy of the newest that continues one row later."""
  import jax

  from cm3leon_jax.mesh import create_mesh
  from cm3leon_jax.training.steps import compile_steps
  from cm3leon_jax.weights.checkpoint import Checkpoints

  settings, train = processes.settings(), folder / "train"
  with jax.set_mesh(create_mesh(settings.mesh)):
    sections = (settings.model, settings.optimizer, settings.train, settings.vocab)
    init = compile_steps(*sections, settings.seed).init
    old = Checkpoints(train, keep=2)
    step = old.newest()
    old.check(step)
    state, next_row = old.restore(jax.eval_shape(init), step)
    old.close()
    new = Checkpoints(folder / "shifted", keep=2)
    new.save(state, step, next_row + 1)
    new.close()
  for name in ("checkpoints", "checkpoints.digests"):
    shutil.rmtree(train / name)
    (folder / "shifted" / name).rename(train / name)


def measure(root: pathlib.Path, seed: int, count: int) -> Iterator[dict]:
  """Yields the results of the negative control, then of killed runs with `count` kills in total."""
  known = reference(root)
  path = root / "control.json"
  if not path.exists():
    write_json(path, control(root, known))
  yield read_json(path)
  run, kills = 0, 0
  while kills < count:
    path = root / f"run_{run:03d}.json"
    if not path.exists():
      write_json(path, killed_run(root, seed, run, count - kills, known))
    result = read_json(path)
    kills += len(result["kills"])
    run += 1
    yield result


def summarize(runs: list[dict]) -> dict:
  """Counts the kills, and the steps and seconds that were lost to them."""
  first, *runs = runs
  kills = [kill for run in runs for kill in run["kills"]]
  resumed = [kill["seconds_to_resume"] for kill in kills if kill["seconds_to_resume"] is not None]
  lost = [max(0, kill["last_step"] - kill["sealed"]) for kill in kills]
  return {
    "kills": len(kills),
    "runs": len(runs),
    "runs_equal": sum(not run["differing"] for run in runs),
    "differing": {f"run {run['run']}": run["differing"] for run in runs if run["differing"]},
    "saving": sum(kill["saving"] for kill in kills),
    "steps_lost": {"most": max(lost, default=0), "mean": round(statistics.fmean(lost or [0]), 2)},
    "replayed": sum(run["replayed"] for run in runs),
    "replayed_equal": sum(run["replayed_equal"] for run in runs),
    "seconds_to_resume": spread(resumed),
    "control_differs": bool(first["differing"]),
  }


def spread(values: list[float]) -> dict[str, float]:
  """Returns median, minimum and maximum of the values; {} if there are no values."""
  if not values:
    return {}
  return {"median": statistics.median(values), "least": min(values), "most": max(values)}

"""Runs the commands of `benchmarks.faults` in processes that can be killed, and reads results.

A command runs in a fork of a process that has already imported the libraries, so it starts within a
second. Apart from that, it runs like `python -m launch.NAME`.
"""

import contextlib
import multiprocessing
import os
import pathlib
import runpy
import signal
import sys
import time

from cm3leon_jax.files.digests import digest
from cm3leon_jax.files.json_files import read_json, read_json_lines, write_json
from cm3leon_jax.stages.stages import DONE

CONFIG = "benchmarks/faults/config.py"
IMPORTED = (
  "cm3leon_jax.commands.common",
  "cm3leon_jax.config.settings",
  "cm3leon_jax.run.initial",
  "cm3leon_jax.generation.heldout",
  "cm3leon_jax.evaluation.likelihood.bits",
  "cm3leon_jax.training.decoder",
  "tests.launch.stages_before",
  "torch",  # `launch.export` checks its result with transformers.
  "transformers",
)
# Environment variables of all processes. Tiny models take longer to compile than to run, so
# optimizations are off.
ENVIRONMENT = {
  "JAX_PLATFORMS": "cpu",
  "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
  "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}
# Without this flag, XLA may start collectives in different orders on the devices, which deadlocks.
XLA_FLAGS = (
  "--xla_force_host_platform_device_count={devices}"
  " --xla_cpu_enable_concurrency_optimized_scheduler=false"
)
# Files of an export that contain its time, its duration, or the name of the run.
NAMED = (DONE, "README.md", "digests.json", "training_data.json")
LOG, CACHE = "log.txt", "compilation_cache"
POLL_SECONDS = 0.01


def forkserver():
  """Returns a `multiprocessing` context that forks processes with the variables `ENVIRONMENT`."""
  os.environ.update(ENVIRONMENT)
  context = multiprocessing.get_context("forkserver")
  context.set_forkserver_preload(list(IMPORTED))
  return context


def _prepare(folder: pathlib.Path, devices: int) -> None:
  """Sets the log and the fake devices of a process, before JAX initializes."""
  import jax

  log = (folder / LOG).open("a")
  os.dup2(log.fileno(), 1)
  os.dup2(log.fileno(), 2)
  os.environ["XLA_FLAGS"] = XLA_FLAGS.format(devices=devices)
  jax.config.update("jax_compilation_cache_dir", str(folder / CACHE))


def _run_command(folder, name, arguments) -> None:
  _prepare(folder, devices=1)
  sys.argv = [f"launch.{name}", *arguments]
  with _leaving():
    runpy.run_module(f"launch.{name}", run_name="__main__", alter_sys=True)


def _run_function(folder, function, arguments, devices) -> None:
  _prepare(folder, devices)
  with _leaving():
    function(*arguments)


@contextlib.contextmanager
def _leaving():
  """Waits for the other processes of the job at the end, as JAX does when a program exits."""
  import jax

  try:
    yield
  finally:  # `multiprocessing` skips `atexit` functions.
    if jax.distributed.is_initialized():
      jax.distributed.shutdown()


class Process:
  """Process with a folder for its log.

  Attributes:
    folder: folder that contains `LOG` and `CACHE`.
    started: value of `time.monotonic` at the start.
  """

  def __init__(self, folder: pathlib.Path, target, arguments: tuple):
    """Starts a process that runs `target(folder, *arguments)`."""
    folder.mkdir(parents=True, exist_ok=True)
    self.folder, self.started = folder, time.monotonic()
    self._process = forkserver().Process(target=target, args=(folder, *arguments))
    self._process.start()

  @classmethod
  def command(cls, folder, name: str) -> "Process":
    """Starts `launch.NAME` on the run in `folder`."""
    return cls(folder, _run_command, (name, [f"--config={CONFIG}", f"--workdir={folder}"]))

  @classmethod
  def function(cls, folder, function, *arguments, devices: int = 1) -> "Process":
    """Starts `function(*arguments)`; the function and the arguments must be picklable."""
    return cls(folder, _run_function, (function, arguments, devices))

  def wait(self, seconds: float | None = None) -> int | None:
    """Returns the exit code, or None if the process still runs after `seconds`."""
    self._process.join(None if seconds is None else max(0.0, seconds))
    return self._process.exitcode

  def kill(self) -> bool:
    """Sends SIGKILL; returns whether it ended the process, which may have ended before."""
    self._process.kill()
    self._process.join()
    return self._process.exitcode == -signal.SIGKILL

  @property
  def log(self) -> str:
    """Output of this process, and of earlier processes in the same folder."""
    path = self.folder / LOG
    return path.read_text(errors="replace") if path.exists() else ""


def finish(process: Process) -> float:
  """Waits for a process; returns its run time in seconds. Raises RuntimeError if it failed."""
  if code := process.wait():
    raise RuntimeError(f"{process.folder}: exit code {code}:\n{process.log[-3000:]}")
  return time.monotonic() - process.started


def make_workdir(root: pathlib.Path) -> None:
  """Runs the stages that precede training, in a separate process."""
  finish(Process.function(root, _make_workdir, root))


def _make_workdir(root: pathlib.Path) -> None:
  from tests.launch.stages_before import make_workdir as make

  make(root, settings())
  for name in ("documents", "neighbors", "text_tokenizer", "vqgan"):
    done = {"id": name, "config": {}, "summary": {}, "seconds": 0.0}
    write_json(root / name / DONE, done)


def settings():
  """Returns the settings of `CONFIG`."""
  from benchmarks.faults import config
  from cm3leon_jax.config.settings import settings_from_config

  return settings_from_config(config.get_config())


def logged(workdir: pathlib.Path) -> list[dict]:
  """Returns the lines in the metrics log of a run."""
  return read_json_lines(workdir / "train" / "metrics" / "metrics.jsonl")


def last_step(workdir: pathlib.Path) -> int:
  """Returns the last step in the metrics log of a run; 0 if there is none."""
  return max((line["step"] for line in logged(workdir) if "loss" in line), default=0)


def sealed_steps(workdir: pathlib.Path) -> list[int]:
  """Returns, in ascending order, the steps whose checkpoints have a file of digests."""
  train = workdir / "train"
  found = [path.stem for path in (train / "checkpoints.digests").glob("*.json")]
  return sorted(int(step) for step in found if (train / "checkpoints" / step).exists())


def unfinished_save(workdir: pathlib.Path) -> bool:
  """Returns whether the run has a checkpoint that is incomplete or has no file of digests."""
  train = workdir / "train"
  steps = {path.name for path in (train / "checkpoints").glob("[0-9]*")}
  return bool(steps - {f"{step}" for step in sealed_steps(workdir)})


def result_of(workdir: pathlib.Path) -> dict:
  """Returns all results that a run must reproduce exactly; times and rates are omitted.

  Losses and held-out losses are lists, so a step that is logged twice makes a difference.
  """
  losses, heldout = [], []
  for line in logged(workdir):
    kept = {k: v for k, v in line.items() if k not in ("time", "tokens_per_second", "mfu")}
    if "loss" in line:
      losses.append(kept)
    elif "heldout_loss" in line:
      heldout.append({k: v for k, v in kept.items() if k == "step" or k.startswith("heldout")})
  samples = sorted((workdir / "train" / "samples").glob("*.png"))
  exported = sorted(p for p in (workdir / "export").glob("*") if p.name not in NAMED)
  metrics = workdir / "evaluation" / "metrics.json"
  done = workdir / "train" / DONE
  summary = read_json(done)["summary"] if done.exists() else {}
  return {
    "losses": losses,
    "heldout": heldout,
    "rows": summary.get("next_row"),
    "samples": {path.name: digest(path) for path in samples},
    "evaluation": read_json(metrics) if metrics.exists() else {},
    "export": {path.name: digest(path) for path in exported},
  }


def differing(found: dict, expected: dict) -> list[str]:
  """Returns the keys of `expected` whose values differ in `found`."""
  return [name for name in expected if found.get(name) != expected[name]]

"""Runs commands as a user does, but in forks of a process that has imported the libraries.

Otherwise tests of rejected flags would spend nearly all of their time on imports.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import pathlib
import runpy
import select
import signal
import subprocess
import sys
import tempfile
from typing import ClassVar
import warnings

ROOT = pathlib.Path(__file__).parents[1]
# Configs of the demo.
SCENES = str(ROOT / "examples" / "scenes" / "config.py")
INSTRUCT = str(ROOT / "examples" / "scenes" / "instruct.py")
# Imports of most commands that read a run; a server that has imported them saves seconds.
SLOW = ("cm3leon_jax.weights.checkpoint",)
SERVER = "from tests.launched import serve; serve()"


class Server:
  """Process with imported modules, which forks a process for each command."""

  running: ClassVar[list["Server"]] = []

  def __init__(self, imported: tuple[str, ...]):
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    self._process = subprocess.Popen(
      [sys.executable, "-c", SERVER, *imported],
      env={**os.environ, "PYTHONPATH": path},
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      start_new_session=True,  # In a session of its own, `killpg` also kills the forks.
    )
    self.pid = self._process.pid
    self.running.append(self)
    atexit.register(self.close)

  def run(self, job: dict, timeout: float) -> int:
    """Runs a job and returns its exit code."""
    self._process.stdin.write(json.dumps(job) + "\n")
    self._process.stdin.flush()
    if not select.select([self._process.stdout], [], [], timeout)[0]:
      self.close()
      raise TimeoutError(f"{job['argv']} did not end within {timeout} s.")
    return int(self._process.stdout.readline())

  def close(self) -> None:
    """Kills the server and its forks; the next command starts a new server."""
    server.cache_clear()
    self.running[:] = [other for other in self.running if other is not self]
    with contextlib.suppress(ProcessLookupError):
      os.killpg(self.pid, signal.SIGKILL)
    self._process.communicate()


@functools.cache
def server(imported: tuple[str, ...]) -> Server:
  """Starts, or reuses, the server that has imported these modules."""
  return Server(imported)


def run(
  module: str, argv: list[str], cwd=ROOT, missing=(), imported=(), timeout=300, **environment
):
  """Runs a module as the main program in a separate process; returns a CompletedProcess.

  Args:
    module: name of the module.
    argv: name of the program and its arguments.
    cwd: working directory of the program.
    missing: modules that cannot be imported, as if they are not installed.
    imported: slow modules that are imported once, before the program starts.
    timeout: maximum run time in seconds.
    **environment: environment variables to add or replace. Variables that JAX
      reads at import have no effect.
  """
  with tempfile.TemporaryDirectory() as folder:
    job = {"module": module, "argv": argv, "cwd": str(cwd), "missing": missing, "out": folder}
    code = server(imported).run({**job, "environment": {**os.environ, **environment}}, timeout)
    texts = [(pathlib.Path(folder) / name).read_text() for name in ("stdout", "stderr")]
  return subprocess.CompletedProcess(argv, code, *texts)


def python(code: str, *arguments, timeout=300, **options) -> subprocess.CompletedProcess:
  """Runs code in a new Python process."""
  command = [sys.executable, "-c", code, *map(str, arguments)]
  options = {"capture_output": True, "text": True, "check": False, **options}
  return subprocess.run(command, timeout=timeout, **options)


def launch(name: str, *flags: str, **options):
  """Runs `python -m launch.NAME`, see `run`."""
  return run(f"launch.{name}", [f"launch.{name}", *map(str, flags)], **options)


def cm3leon(*flags: str, **options):
  """Runs the console script `cm3leon`, see `run`."""
  return run("cm3leon_jax.__main__", ["cm3leon", *map(str, flags)], **options)


def serve() -> None:
  """Forks a process for each line of stdin, a job, and prints its exit code."""
  import cm3leon_jax.commands.common
  import cm3leon_jax.config.settings  # noqa: F401

  for module in sys.argv[1:]:
    importlib.import_module(module)
  gc.collect()
  gc.freeze()  # Without this, garbage collection at exit takes 0.6 s.
  for line in sys.stdin:
    with warnings.catch_warnings():
      # Forking is safe, because JAX runs no threads yet.
      warnings.filterwarnings("ignore", message=".*fork")
      child = os.fork()
    if not child:
      return _run(json.loads(line))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _run(job: dict) -> None:
  for number, name in enumerate((os.devnull, "stdout", "stderr")):
    # For /dev/null, which is absolute, the folder has no effect.
    path = pathlib.Path(job["out"], name)
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT if number else os.O_RDONLY), number)
  os.environ.clear()
  os.environ.update(job["environment"])
  os.chdir(job["cwd"])
  sys.argv = job["argv"]
  sys.modules.update(dict.fromkeys(job["missing"]))
  runpy.run_module(job["module"], run_name="__main__", alter_sys=True)

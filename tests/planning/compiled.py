"""Runs `cm3leon aot_compile` in a new process, because a process cannot unload libtpu."""

import json
import os
import pathlib
import subprocess
import sys


def run_command(*flags: str) -> subprocess.CompletedProcess:
  command = [sys.executable, "-m", "launch.aot_compile", *flags]
  # Memory use must be that of optimized programs.
  environment = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
  return subprocess.run(
    command, capture_output=True, text=True, timeout=900, env=environment, check=False
  )


def aot_compile(folder: pathlib.Path, *flags: str) -> dict:
  """Runs the command with these flags and returns its reports: program name -> report."""
  result = run_command(f"--json={folder / 'report.json'}", *flags)
  assert result.returncode == 0, result.stderr[-2000:]
  return json.loads((folder / "report.json").read_text())

"""Checks that the extras resolve together, with the oldest and the newest Python of the project.

  python .ci/extras.py

Nothing is installed: uv reads the metadata of wheels and searches for versions that satisfy
constraints.txt. What resolves with more extras resolves with fewer, so each device has one set.
"""

import pathlib
import subprocess
import sys
import tomllib

ROOT = pathlib.Path(__file__).resolve().parents[1]
PYTHONS = ("3.11", "3.13")
# `dev` contains aot, docs, ray, serve and test. The libtpu of aot may differ from that of tpu.
SETS = ("data,demo,dev,eval,monitoring", *(f"{x},data,demo,monitoring,ray,serve,test" for x in (
  "tpu", "cuda12", "cuda13",
)))  # fmt: skip


def resolve(extras: str, python: str) -> str:
  """Returns the error message of uv; "" if it found versions."""
  chosen = [f"--extra={extra}" for extra in extras.split(",")]
  result = subprocess.run(
    [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-build", "pyproject.toml"]
    # Python for builds. There are none, but without it uv searches for a Python for 30 seconds.
    + ["--constraint=constraints.txt", *chosen, f"--python={sys.executable}"]
    + [f"--python-version={python}", "--python-platform=x86_64-manylinux_2_31"],
    cwd=ROOT, capture_output=True, text=True, check=False,
  )  # fmt: skip
  return result.stderr if result.returncode else ""


def main() -> int:
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  tried = {extra for extras in SETS for extra in extras.split(",")} | {"aot", "docs"}
  failed = {*project["optional-dependencies"]} != tried
  if failed:
    print(f"extras: SETS must contain each extra of pyproject.toml: {sorted(tried)}")
  for extras in SETS:
    for python in PYTHONS:
      error = resolve(extras, python)
      print(f"[{extras}] on Python {python}: {error or 'resolves'}", flush=True)
      failed |= bool(error)
  return int(failed)


if __name__ == "__main__":
  sys.exit(main())

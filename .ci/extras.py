"""Resolves every extra, alone and as this repository installs it, for each supported Python.

  python .ci/extras.py

Nothing is installed: uv reads the metadata of wheels, and looks for versions that fit together
and fit requirements.txt.
"""

from concurrent import futures
import pathlib
import re
import subprocess
import sys
import time
import tomllib

ROOT = pathlib.Path(__file__).resolve().parents[1]
PYTHONS = ("3.11", "3.12", "3.13")
# Files that install extras, or whose text says how to install them.
FILES = ("launch/**/*", ".github/workflows/*", "cm3leon_jax/**/*.py", "docs/*.md", "*.md")
INSTALLS = re.compile(
  r"make_venv ([a-z][\w,]*)|(?:\.|cm3leon_jax)\[((?:\$EXTRA|[a-z]\w*)(?:,\w+)*)\]['\"\s]"
)
CHOICES = re.compile(r'case "\$EXTRA" in ([\w| ]+)\)')


def declared() -> list[str]:
  """Extras of pyproject.toml."""
  metadata = tomllib.loads((ROOT / "pyproject.toml").read_text())
  return list(metadata["project"]["optional-dependencies"])


def installed_by(text: str) -> set[str]:
  """Returns extras that a file installs together, e.g. {"demo,dev"}.

  `$EXTRA` is each choice of the file's `case "$EXTRA"`.
  """
  found = set()
  for match in INSTALLS.finditer(text):
    extras = match[1] or match[2]
    if "$EXTRA" in extras:
      choices = CHOICES.search(text)[1].replace(" ", "").split("|")
      found |= {extras.replace("$EXTRA", choice) for choice in choices}
    else:
      found.add(extras)
  return found


def shipped() -> dict[str, list[str]]:
  """Extras that files of the repository install together -> those files."""
  found = {}
  paths = {path for pattern in FILES for path in ROOT.glob(pattern)}
  for path in sorted(path for path in paths if path.is_file() and path.suffix != ".pyc"):
    for extras in installed_by(path.read_text(errors="ignore")):
      found.setdefault(extras, []).append(str(path.relative_to(ROOT)))
  return found


def resolve(extras: str, python: str) -> tuple[str, float]:
  """Returns uv's message, empty if it found versions, and the seconds it took."""
  chosen = [f"--extra={extra}" for extra in extras.split(",")]
  start = time.monotonic()
  result = subprocess.run(
    [sys.executable, "-m", "uv", "pip", "compile", "pyproject.toml", "--quiet", *chosen]
    # Used for builds, of which there are none; else uv looks for another Python for half a minute.
    + [f"--python={sys.executable}"]
    + [f"--python-version={python}", "--python-platform=x86_64-manylinux_2_31", "--no-build"]
    + ["--constraint=requirements.txt"],
    cwd=ROOT, capture_output=True, text=True, check=False,
  )  # fmt: skip
  return result.stderr if result.returncode else "", time.monotonic() - start


def main() -> int:
  start, failures = time.monotonic(), 0
  jobs = [(e, python) for e in sorted({*declared(), *shipped()}) for python in PYTHONS]
  with futures.ThreadPoolExecutor(4) as pool:
    for (extras, python), (error, seconds) in zip(jobs, pool.map(lambda j: resolve(*j), jobs)):
      print(f"[{extras}] on Python {python}: {error or 'resolves'} ({seconds:.1f} s)", flush=True)
      failures += bool(error)
  print(f"extras: {len(jobs) - failures} of {len(jobs)} resolve, {time.monotonic() - start:.0f} s.")
  return 1 if failures else 0


if __name__ == "__main__":
  sys.exit(main())

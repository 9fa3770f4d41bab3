"""Checks, for each Python version, that all sets of packages that this repository installs resolve.

  python .ci/extras.py

The sets are each extra, each combination of extras that a file of the repository installs or
describes, and all other packages that follow `pip install`. Nothing is installed: uv reads the
metadata of wheels and searches for compatible versions that satisfy constraints.txt.
"""

from concurrent import futures
import functools
import itertools
import pathlib
import re
import subprocess
import sys
import time
import tomllib

ROOT = pathlib.Path(__file__).resolve().parents[1]
PYTHONS = ("3.11", "3.12", "3.13")
# Files that install extras, or describe how to install them.
FILES = (
  "launch/**/*",
  ".github/workflows/*",
  "cm3leon_jax/**/*.py",
  "cm3leon_jax/**/*.jinja",
  "docs/*.md",
  "*.md",
)
INSTALLS = re.compile(
  r"(?:make_venv|setup\.sh\"?) ([a-z][\w,]*)"
  r"|\.\[((?:\$EXTRA|[a-z]\w*)(?:,\w+)*)\]['\"\s]"
)
# The text after `pip install` on the same line; then a requirement in this text.
AFTER_PIP = re.compile(r"pip install ([^`;&|]+)")
REQUIREMENT = re.compile(r"(?![\w.-]*\.whl)[a-zA-Z][\w.-]*(?:\[\w+\])?(?:[<>=!~]=?[\w.,<>=!~*]+)?")
CHOICES = re.compile(r'case "\$EXTRA" in ([\w| ]+)\)')


def declared() -> list[str]:
  """Extras of pyproject.toml."""
  metadata = tomllib.loads((ROOT / "pyproject.toml").read_text())
  return list(metadata["project"]["optional-dependencies"])


def installed_by(text: str) -> set[str]:
  """Returns the combinations of extras that a file installs, e.g. {"demo,dev"}.

  For `$EXTRA`, returns one combination per choice in the file's `case "$EXTRA"`.
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


def packages_in(text: str) -> set[tuple[tuple[str, ...], tuple[str, ...]]]:
  """Returns the packages that a file installs together, with the Python versions that it names.

  python3.12 -m pip install "xprof>=2" uv    ->    {(("xprof>=2", "uv"), ("3.12",))}
  """
  found = set()
  for line in text.replace("\\\n", " ").splitlines():
    pythons = tuple(sorted(set(re.findall(r"python(3\.\d+)", line))))
    for match in AFTER_PIP.finditer(line):
      # In a sentence, a comma or a colon ends the list of packages.
      sentence = re.split(r"(?<=\S)[,:](?=\s)", match[1])[0]
      words = [word.strip("'\".:,)") for word in sentence.split()]
      words = itertools.dropwhile(lambda word: word.startswith("--"), words)
      if names := tuple(itertools.takewhile(REQUIREMENT.fullmatch, words)):
        found.add((names, pythons))
  return found


def files() -> dict[str, str]:
  """Returns path -> text of each file that installs packages or describes how to."""
  paths = {path for pattern in FILES for path in ROOT.glob(pattern)}
  chosen = sorted(path for path in paths if path.is_file() and path.suffix != ".pyc")
  return {str(path.relative_to(ROOT)): path.read_text(errors="ignore") for path in chosen}


def shipped() -> dict[str, list[str]]:
  """Returns combination of extras -> files of the repository that install it."""
  found = {}
  for path, text in files().items():
    for extras in installed_by(text):
      found.setdefault(extras, []).append(path)
  return found


def compile_requirements(source: list[str], python: str, requirements: str = ""):
  """Returns uv's error message, or "" if uv found versions, and the time in seconds."""
  start = time.monotonic()
  result = subprocess.run(
    [sys.executable, "-m", "uv", "pip", "compile", "--quiet", *source]
    # Python for builds. There are none, but without it uv searches for a Python for 30 seconds.
    + [f"--python={sys.executable}"]
    + [f"--python-version={python}", "--python-platform=x86_64-manylinux_2_31", "--no-build"],
    cwd=ROOT, input=requirements, capture_output=True, text=True, check=False,
  )  # fmt: skip
  return result.stderr if result.returncode else "", time.monotonic() - start


def resolve(extras: str, python: str) -> tuple[str, float]:
  """Resolves extras with constraints.txt; returns the same as `compile_requirements`."""
  chosen = [f"--extra={extra}" for extra in extras.split(",")]
  source = ["pyproject.toml", "--constraint=constraints.txt", *chosen]
  return compile_requirements(source, python)


def main() -> int:
  start, failures = time.monotonic(), 0
  jobs = {}  # Name of a set of packages -> function that resolves it.
  for extras in sorted({*declared(), *shipped()}):
    for python in PYTHONS:
      jobs[f"[{extras}] on Python {python}"] = functools.partial(resolve, extras, python)
  for names, pythons in sorted(set().union(*map(packages_in, files().values()))):
    for python in pythons or PYTHONS:
      jobs[f"{' '.join(names)} on Python {python}"] = functools.partial(
        compile_requirements, ["-"], python, "\n".join(names)
      )
  with futures.ThreadPoolExecutor(4) as pool:
    for name, (error, seconds) in zip(jobs, pool.map(lambda job: job(), jobs.values())):
      print(f"{name}: {error or 'resolves'} ({seconds:.1f} s)", flush=True)
      failures += bool(error)
  seconds = time.monotonic() - start
  print(f"installs: {len(jobs) - failures} of {len(jobs)} resolve, {seconds:.0f} s.")
  return 1 if failures else 0


if __name__ == "__main__":
  sys.exit(main())

"""One-line mutants of the package, and the test files that must fail on each.

  python -m tests.mutants                    # all of them
  python -m tests.mutants --part=2/4         # the second quarter
  python -m tests.mutants --only=adamw       # those whose name holds a word

A mutant replaces one text of one file, in a copy of the tree, and runs only the test files that
claim to notice. A mutant that no test notices survives: the tests have a hole there.
`mutants_test.py` runs the same list (marked `slow`), and checks on every run that each text to
replace is still there, once.
"""

import argparse
from collections.abc import Sequence
import dataclasses
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

from tests.mutant_list import MUTANTS, Mutant

ROOT = pathlib.Path(__file__).resolve().parents[1]
COPIED = ("cm3leon_jax", "launch", "ml_configs", "benchmarks", "tests", "docs", "pyproject.toml")
TIMEOUT = 300  # Seconds; a mutant that makes a test hang counts as noticed.


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What the tests said of a mutant: `killed_by` names the first failed test, "" if all passed."""

  mutant: Mutant
  killed_by: str
  seconds: float


def apply(mutant: Mutant, root: pathlib.Path) -> None:
  """Writes the mutant into the tree `root`. Raises ValueError unless its text occurs once."""
  path = root / mutant.file
  text = path.read_text(encoding="utf-8")
  if text.count(mutant.old) != 1:
    raise ValueError(
      f"{mutant.name}: {mutant.file} holds {mutant.old!r} {text.count(mutant.old)} times"
    )
  path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")


def run(mutant: Mutant | None, tests: Sequence[str]) -> Outcome:
  """Runs test files on a copy of the tree with the mutant in it; None: the tree as it is."""
  start = time.monotonic()
  with tempfile.TemporaryDirectory() as folder:
    root = pathlib.Path(folder)
    for name in COPIED:
      source = ROOT / name
      if source.is_dir():
        shutil.copytree(source, root / name, ignore=shutil.ignore_patterns("__pycache__"))
      else:
        shutil.copy(source, root / name)
    if mutant is not None:
      apply(mutant, root)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    try:
      result = subprocess.run(
        command, cwd=root, capture_output=True, text=True, timeout=TIMEOUT, check=False
      )
    except subprocess.TimeoutExpired:
      return Outcome(mutant, f"no end within {TIMEOUT} s", time.monotonic() - start)
  failed = [line for line in result.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
  if result.returncode not in (0, 1, 2):
    raise RuntimeError(f"pytest ended with {result.returncode}: {result.stdout}{result.stderr}")
  killed_by = failed[0].split(" ", 1)[1].split(" - ")[0] if failed else ""
  if result.returncode and not killed_by:
    raise RuntimeError(f"pytest failed and named no test: {result.stdout}{result.stderr}")
  return Outcome(mutant, killed_by, time.monotonic() - start)


def part(mutants: Sequence[Mutant], which: str) -> list[Mutant]:
  """Every n-th mutant, from the k-th on, for `which` = "k/n"."""
  number, parts = map(int, which.split("/"))
  return list(mutants[number - 1 :: parts])


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--part", default="1/1", help="which part of the list, e.g. 2/4")
  parser.add_argument("--only", default="", help="only mutants whose name holds this")
  options = parser.parse_args()
  chosen = [m for m in part(MUTANTS, options.part) if options.only in m.name]
  survivors, start = [], time.monotonic()
  for mutant in chosen:
    outcome = run(mutant, mutant.tests)
    survivors += [] if outcome.killed_by else [mutant.name]
    print(f"{mutant.name}: {outcome.killed_by or 'SURVIVES'} ({outcome.seconds:.0f} s)", flush=True)
  killed = len(chosen) - len(survivors)
  print(f"{killed} of {len(chosen)} mutants killed in {time.monotonic() - start:.0f} s.")
  sys.exit(bool(survivors))


if __name__ == "__main__":
  main()

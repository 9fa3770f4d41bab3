"""Runs mutants: small changes of the package that at least one test must notice.

  python -m tests.mutants                    # all mutants
  python -m tests.mutants --part=2/4         # every fourth mutant, starting with the second
  python -m tests.mutants --only=adam        # mutants whose name contains "adam"

A mutant replaces one text of one file in a copy of the repository. Only the tests that are listed
for the mutant run. Tests marked `slow` run only if no other test notices the mutant. A mutant that
no test notices survives and shows a gap in the tests. A mutant that cannot be imported proves
nothing about the tests, so it counts as invalid, not as killed. `mutants_test.py` runs the same
list in a test marked `slow`. Its other tests check that each mutant can be applied and that its
tests exist.
"""

import argparse
from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

import pytest

from tests.mutant_list import MUTANTS
from tests.mutant_lists.mutant import Mutant

ROOT = pathlib.Path(__file__).resolve().parents[1]
COPIED = ("cm3leon_jax", "launch", "ml_configs", "benchmarks", "examples", "tests", "docs")
COPIED += ("pyproject.toml",)
TIMEOUT = 300  # Seconds.
KILLED, SURVIVES, INVALID = "killed by", "SURVIVES", "INVALID:"
NOT_A_PROGRAM = ("SyntaxError", "IndentationError", "NameError", "UnboundLocalError", "ImportError")


@dataclasses.dataclass(frozen=True)
class Outcome:
  """Outcome of running a mutant's tests.

  Attributes:
    verdict: KILLED, SURVIVES or INVALID.
    detail: the first test that failed, or the reason why the mutant is invalid.
    seconds: duration of the tests.
    slow: whether the tests marked `slow` ran.
  """

  verdict: str
  detail: str
  seconds: float
  slow: bool = False


def mutated(mutant: Mutant, text: str) -> str:
  """Applies a mutant. Raises ValueError if `old` does not occur exactly once, or on bad syntax."""
  if text.count(mutant.old) != 1:
    raise ValueError(
      f"{mutant.name}: {mutant.file} contains {mutant.old!r} {text.count(mutant.old)} times, not "
      "once."
    )
  result = text.replace(mutant.old, mutant.new)
  try:
    compile(result, mutant.file, "exec")
  except SyntaxError as error:
    raise ValueError(f"{mutant.name}: {mutant.file} does not compile: {error}.") from None
  return result


def verdict_of(code: int, output: str) -> tuple[str, str]:
  """Returns verdict and detail of a run of `pytest -x`, given its exit code and output.

  A failing test or fixture kills the mutant. It is invalid if a file cannot be collected, or if the
  error shows that the mutant is not a valid program. It survives if the test marks select no test.
  """
  if code in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
    return SURVIVES, ""
  summary = output.rpartition("short test summary info")[2]  # Logs above may contain similar lines.
  lines = [line for line in summary.splitlines() if line.startswith(("FAILED ", "ERROR "))]
  if code != 1 or not lines:
    return INVALID, f"pytest ended with {code}: {' '.join(lines) or output[-400:]}"
  test, _, reason = lines[0].split(" ", 1)[1].partition(" - ")
  if "::" not in test or reason.startswith(NOT_A_PROGRAM):
    return INVALID, lines[0]
  return KILLED, test


@contextlib.contextmanager
def copied() -> Iterator[pathlib.Path]:
  """Yields the root of a temporary copy of the repository."""
  with tempfile.TemporaryDirectory() as folder:
    root = pathlib.Path(folder) / "tree"
    root.mkdir()
    for name in COPIED:
      if (ROOT / name).is_dir():
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
      else:
        shutil.copy(ROOT / name, root / name)
    yield root


@contextlib.contextmanager
def _changed(path: pathlib.Path, mutant: Mutant) -> Iterator[None]:
  """Applies a mutant to a file, and undoes it at the end of the context."""
  text = path.read_text(encoding="utf-8")
  path.write_text(mutated(mutant, text), encoding="utf-8")
  try:
    yield
  finally:
    path.write_text(text, encoding="utf-8")


def run(
  root: pathlib.Path,
  mutant: Mutant | None,
  tests: Sequence[str],
  timeout: float = TIMEOUT,
  slow: bool = False,
) -> Outcome:
  """Runs tests on a copy of the repository to which a mutant is applied.

  Args:
    root: root of the copy.
    mutant: mutant to apply, or None to run the tests without one.
    tests: files or node ids.
    timeout: maximum run time in seconds.
    slow: whether to run only the tests marked `slow` (True), or only the other tests (False).
  """
  start, marks = time.monotonic(), "slow" if slow else "not slow"
  options = ["-q", "-x", "-p", "no:cacheprovider", "-m", marks]
  command = [sys.executable, "-m", "pytest", *options, *tests]
  # Otherwise pytest truncates the lines of its summary.
  environment = {**os.environ, "COLUMNS": "400"}
  # Compiling Python code, including that of libraries, takes half of the time of a small test.
  environment["PYTHONPYCACHEPREFIX"] = str(root.parent / "bytecode")
  environment.pop("PYTHONDONTWRITEBYTECODE", None)
  with _changed(root / mutant.file, mutant) if mutant else contextlib.nullcontext():
    try:
      result = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, timeout=timeout
      )
    except subprocess.TimeoutExpired:
      verdict, detail = INVALID, f"no end within {timeout} s"
    else:
      verdict, detail = verdict_of(result.returncode, result.stdout)
  return Outcome(verdict, detail, time.monotonic() - start, slow)


def noticed(root: pathlib.Path, mutant: Mutant) -> Outcome:
  """Runs the tests of a mutant; tests marked `slow` run only if no other test notices it."""
  outcome = run(root, mutant, mutant.tests)
  if outcome.verdict != SURVIVES:
    return outcome
  outcome = run(root, mutant, mutant.tests, slow=True)
  if outcome.verdict != KILLED:
    return outcome
  unchanged = run(root, None, mutant.tests, slow=True)
  if unchanged.verdict == SURVIVES:
    return outcome
  return Outcome(INVALID, f"without it, too: {unchanged.detail}", outcome.seconds, slow=True)


def part(mutants: Sequence[Mutant], which: str) -> list[Mutant]:
  """Returns every n-th mutant, starting with the k-th; `which` is "k/n"."""
  number, parts = map(int, which.split("/"))
  return list(mutants[number - 1 :: parts])


def report(root: pathlib.Path, mutants: Sequence[Mutant]) -> bool:
  """Runs mutants in a copy of the tree, prints their outcomes, and returns whether all were killed.

  Before that, all tests must pass without a mutant: a failing test would kill every mutant.
  """
  killed, by_default, start = 0, 0, time.monotonic()
  tests = sorted({test for mutant in mutants for test in mutant.tests})
  unchanged = run(root, None, tests, timeout=3_600)
  if unchanged.verdict != SURVIVES:
    print(f"These tests do not pass without a mutant: {unchanged.detail}")
    return False
  for mutant in mutants:
    outcome = noticed(root, mutant)
    killed += outcome.verdict == KILLED
    by_default += outcome.verdict == KILLED and not outcome.slow
    said = f"{outcome.verdict} {outcome.detail}".rstrip()
    print(f"{mutant.name}: {said} ({outcome.seconds:.0f} s)", flush=True)
  print(
    f"{killed} of {len(mutants)} mutants killed in {time.monotonic() - start:.0f} s, {by_default} "
    "of them by tests that are not slow."
  )
  return killed == len(mutants)


def main() -> None:
  parser = argparse.ArgumentParser(description="Runs the mutants of tests/mutant_list.py.")
  parser.add_argument("--part", default="1/1", help="which part of the list, e.g. 2/4")
  parser.add_argument("--only", default="", help="only mutants whose name contains this")
  options = parser.parse_args()
  chosen = [m for m in part(MUTANTS, options.part) if options.only in m.name]
  if not chosen:
    parser.error(f"no mutant of part {options.part} has a name that contains '{options.only}'.")
  with copied() as root:
    all_killed = report(root, chosen)
  sys.exit(not all_killed)


if __name__ == "__main__":
  main()

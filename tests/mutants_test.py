"""Tests that every mutant can be applied, and (slow) that its tests notice it."""

import ast
import functools
import subprocess

import pytest

from tests import mutants
from tests.mutant_list import MUTANTS
from tests.mutant_lists.mutant import Mutant

CM3, CM3_TEST = "cm3leon_jax/data/rows/cm3.py", "tests/data/rows/cm3_test.py"
RENAMED = Mutant(
  "a_local_renamed",
  CM3,
  "all(end <= a or b <= start for a, b in spans)",
  "all(end <= c or d <= start for c, d in spans)",
  (f"{CM3_TEST}::test_spans_are_disjoint_and_never_cross_a_boundary",),
)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_a_mutant_changes_one_place_and_its_tests_exist(mutant):
  text = (mutants.ROOT / mutant.file).read_text(encoding="utf-8")
  assert mutants.mutated(mutant, text) != text
  assert mutant.tests
  for test in mutant.tests:
    file, *function = test.split("::")
    tests = (mutants.ROOT / file).read_text(encoding="utf-8")
    assert all(f"\ndef {name}(" in tests for name in function), test


def test_there_are_enough_mutants_with_names_of_their_own():
  assert len(MUTANTS) >= 40
  assert len({m.name for m in MUTANTS}) == len(MUTANTS)


def test_the_decoder_and_decoding_have_their_share():
  rooms = ("cm3leon_jax/decoding/", "cm3leon_jax/models/")
  assert sum(m.file.startswith(rooms) for m in MUTANTS) >= 60


@functools.cache
def is_default(test: str) -> bool:
  """Returns whether a test, or any test in a file, is not marked `slow`."""
  file, _, name = test.partition("::")
  body = ast.parse((mutants.ROOT / file).read_text(encoding="utf-8")).body
  marks = [ast.unparse(x.value) for x in body if isinstance(x, ast.Assign)]
  if any(mark == "pytest.mark.slow" for mark in marks):
    return False
  functions = [x for x in body if isinstance(x, ast.FunctionDef)]
  chosen = [x for x in functions if (x.name == name if name else x.name.startswith("test_"))]
  return any("pytest.mark.slow" not in map(ast.unparse, x.decorator_list) for x in chosen)


def test_two_of_three_have_a_test_that_is_not_slow():
  assert is_default("tests/mutants_test.py")
  assert not is_default("tests/mutants_test.py::test_the_mutant_is_noticed")  # Negative control.
  of_default = [m for m in MUTANTS if any(map(is_default, m.tests))]
  assert 3 * len(of_default) >= 2 * len(MUTANTS)


def test_parts_are_the_whole_list():
  parts = [mutants.part(MUTANTS, f"{k}/4") for k in (1, 2, 3, 4)]
  assert sorted(m.name for part in parts for m in part) == sorted(m.name for m in MUTANTS)


@pytest.mark.parametrize(
  ("old", "new", "message"),
  [("OVERHEAD", "COST", "contains 'OVERHEAD' 2 times, not once"), ("b = 2", "b = (", "compile")],
)
def test_what_cannot_be_made_is_refused(old, new, message):
  with pytest.raises(ValueError, match=message):
    mutants.mutated(Mutant("m", CM3, old, new, ()), "OVERHEAD = 3\na = OVERHEAD\nb = 2\n")


@pytest.mark.parametrize(
  ("code", "output", "verdict"),
  [
    (0, "3 passed", mutants.SURVIVES),
    (1, "FAILED tests/a_test.py::test_b[c] - assert 1 == 2", mutants.KILLED),
    (1, "ERROR tests/a_test.py::test_b - ValueError: a fixture", mutants.KILLED),
    (1, "FAILED tests/a_test.py::test_b - NameError: name 'x' is not defined", mutants.INVALID),
    (2, "ERROR tests/a_test.py - SyntaxError: invalid syntax", mutants.INVALID),
    (2, "ERROR tests/a_test.py", mutants.INVALID),
    (4, "ERROR: not found: tests/a_test.py::test_b", mutants.INVALID),
    (5, "3 deselected", mutants.SURVIVES),
  ],
)
def test_only_a_failed_test_kills(code, output, verdict):
  log = "ERROR    absl:checkpoint.py:219 a line of a captured log"
  assert mutants.verdict_of(code, f"{log}\n== short test summary info ==\n{output}")[0] == verdict


@pytest.mark.slow
def test_a_mutant_that_changes_nothing_survives(monkeypatch, capsys):
  monkeypatch.setattr(mutants, "MUTANTS", (RENAMED,))
  monkeypatch.setattr("sys.argv", ["mutants"])
  with pytest.raises(SystemExit) as end:
    mutants.main()
  assert end.value.code == 1
  out = capsys.readouterr().out
  assert out.startswith("a_local_renamed: SURVIVES (")
  assert "0 of 1 mutants killed" in out


@pytest.fixture(scope="session")
def tree():
  with mutants.copied() as root:
    yield root


def test_a_mutant_is_in_the_copy_as_long_as_its_tests_run(tree, monkeypatch):
  before, seen = (tree / CM3).read_text(), []

  def pytest_ends(command, cwd, **_):
    seen.append((cwd / CM3).read_text())
    return subprocess.CompletedProcess(command, 0, "", "")

  monkeypatch.setattr(mutants.subprocess, "run", pytest_ends)
  assert mutants.run(tree, RENAMED, RENAMED.tests).verdict == mutants.SURVIVES
  assert seen == [mutants.mutated(RENAMED, before)]
  assert (tree / CM3).read_text() == before == (mutants.ROOT / CM3).read_text()


@pytest.mark.parametrize(
  ("failing", "verdict", "slow"),
  [
    (("not slow", True), mutants.KILLED, False),
    (("slow", True), mutants.KILLED, True),
    (("slow", True, False), mutants.INVALID, True),  # The slow test fails without a mutant, too.
    ((), mutants.SURVIVES, True),
  ],
)
def test_slow_tests_run_where_no_other_notices(tree, monkeypatch, failing, verdict, slow):
  """`failing`: `-m` marks of failing tests; True: they fail with the mutant, False: without it."""

  def pytest_ends(command, cwd, **_):
    mutated = (cwd / CM3).read_text() != (mutants.ROOT / CM3).read_text()
    fails = command[command.index("-m", 3) + 1] in failing and mutated in failing
    output = f"short test summary info\nFAILED {CM3_TEST}::test_x - assert 1 == 2"
    return subprocess.CompletedProcess(command, int(fails), output, "")

  monkeypatch.setattr(mutants.subprocess, "run", pytest_ends)
  outcome = mutants.noticed(tree, RENAMED)
  assert (outcome.verdict, outcome.slow) == (verdict, slow)


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_the_mutant_is_noticed(tree, mutant):
  outcome = mutants.noticed(tree, mutant)
  assert outcome.verdict == mutants.KILLED, outcome.detail


@pytest.mark.slow
def test_the_tests_pass_without_a_mutant(tree):
  tests = sorted({test for mutant in MUTANTS for test in mutant.tests})
  outcome = mutants.run(tree, None, tests, timeout=3_600)
  assert outcome.verdict == mutants.SURVIVES, outcome.detail

"""Every mutant of the list can be made, and (slow) is noticed by the tests that claim it."""

import pytest

from tests import mutants
from tests.mutant_list import MUTANTS


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_the_text_to_replace_occurs_once(mutant):
  text = (mutants.ROOT / mutant.file).read_text(encoding="utf-8")
  assert text.count(mutant.old) == 1
  assert mutant.new != mutant.old
  assert mutant.tests


def test_there_are_enough_mutants_with_names_of_their_own():
  assert len(MUTANTS) >= 40
  assert len({m.name for m in MUTANTS}) == len(MUTANTS)


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_the_mutant_is_noticed(mutant):
  assert mutants.run(mutant, mutant.tests).killed_by, f"no test noticed {mutant.name}"


@pytest.mark.slow
def test_the_tests_pass_without_a_mutant():
  files = sorted({test for mutant in MUTANTS for test in mutant.tests})
  assert not mutants.run(None, files).killed_by

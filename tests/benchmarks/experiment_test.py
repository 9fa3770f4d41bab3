import pytest

from benchmarks.experiment import student_interval


def test_student_interval_is_that_of_the_docstring():
  assert student_interval([1, 2, 3]) == pytest.approx((-0.484, 4.484), abs=1e-3)
  assert student_interval([1]) is None

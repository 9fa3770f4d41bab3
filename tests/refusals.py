"""Expects refusals: the class of an error and the facts that its text must contain.

def test_a_negative_width_is_refused():
  with refused(FieldError, "width", "-1", path=("width",)):
    build(Sample, {"width": -1}, "sample")
"""

from collections.abc import Iterator
import contextlib
import re
import subprocess
from typing import Any

import pytest


@contextlib.contextmanager
def refused(kind: type[BaseException], *facts: str, **attributes: Any) -> Iterator:
  """Expects an error of class `kind` with these attributes, whose text contains each of the facts.

  Yields:
    The result of `pytest.raises`; after the block, its `value` is the error.

  Raises:
    AssertionError: an attribute differs, or a fact is missing.
  """
  with pytest.raises(kind) as error:
    yield error
  assert {name: getattr(error.value, name) for name in attributes} == attributes
  check_sentence(str(error.value), *facts)


def check_refused(result: subprocess.CompletedProcess, *facts: str, code: int = 2) -> None:
  """Expects that a command exited with `code` and printed only an error of one line."""
  assert (result.returncode, result.stdout) == (code, ""), result.stderr
  assert re.fullmatch(r"error: .*\n", result.stderr), result.stderr
  check_sentence(result.stderr, *facts)


def check_sentence(sentence: str, *facts: str) -> None:
  """Expects that a text contains each of the facts."""
  missing = [fact for fact in facts if fact not in sentence]
  assert not missing, f"{missing} not in {sentence!r}"

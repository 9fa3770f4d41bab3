"""A mutant, and a short way to write those of one file."""

from typing import NamedTuple


class Mutant(NamedTuple):
  """One wrong program.

  Attributes:
    name: what is wrong.
    file: that is changed.
    old: text of the file, found there once.
    new: text in its place.
    tests: files, or tests as pytest names them, that claim to notice it.
  """

  name: str
  file: str
  old: str
  new: str
  tests: tuple[str, ...]


def mutants_of(file: str, test: str, *changes: tuple[str, str, str]) -> tuple[Mutant, ...]:
  """Mutants of one file, each (name, old, new), that one test file, or one test, notices."""
  return tuple(Mutant(name, file, old, new, (test,)) for name, old, new in changes)

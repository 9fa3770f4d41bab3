"""The mutants of `mutants.py`: file, text to replace, replacement, test files that must fail."""

from typing import NamedTuple


class Mutant(NamedTuple):
  """One wrong program. `tests`: files, or tests as pytest names them, that claim to notice it."""

  name: str
  file: str
  old: str
  new: str
  tests: tuple[str, ...]


MUTANTS: tuple[Mutant, ...] = ()

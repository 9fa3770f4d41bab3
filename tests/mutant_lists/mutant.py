"""Defines a mutant, and a short notation for the mutants of a file."""

from typing import NamedTuple


class Mutant(NamedTuple):
  """Change of one file that introduces a mistake.

  Attributes:
    name: description of the mistake.
    file: the changed file.
    old: text that occurs once in the file.
    new: replacement of `old`.
    tests: test files or node ids that must notice the mutant.
  """

  name: str
  file: str
  old: str
  new: str
  tests: tuple[str, ...]


def mutants_of(*listing: str | tuple[str, str, str]) -> tuple[Mutant, ...]:
  """Returns the mutants of a list: a file, then (name, old, new) for each of its mutants.

  `tests/x/y_test.py` must notice the mutants of `cm3leon_jax/x/y.py`, unless the list has another
  test file before them.
  """
  found, file, test = [], "", ""
  for entry in listing:
    if not isinstance(entry, str):
      found.append(Mutant(entry[0], file, *entry[1:], (test,)))
    elif "_test.py" in entry:
      test = entry
    else:
      file = entry
      test = f"tests/{file.removeprefix('cm3leon_jax/').removesuffix('.py')}_test.py"
  return tuple(found)

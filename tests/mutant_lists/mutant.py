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


def mutants_of(*listing: str | tuple[str, str, str]) -> tuple[Mutant, ...]:
  """Mutants of a listing: a file, and each of its mutants as (name, old, new).

  The tests beside a file, `tests/x/y_test.py` of `cm3leon_jax/x/y.py`, notice its mutants, or those
  that the listing names before them.
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

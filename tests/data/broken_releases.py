"""Breaks files of public releases, for tests of their readers."""

from collections.abc import Callable, Iterator, Mapping
import copy
import random
from typing import Any

from cm3leon_jax.errors import UserError
from tests.data import releases

CHANGES = 15  # Number of changes of each file.


def places(value: Any, *before: str | int) -> Iterator[tuple]:
  """Yields the keys and indices that lead to each value inside a JSON value."""
  inner = list(enumerate(value)) if isinstance(value, list) else []
  for key, one in value.items() if isinstance(value, dict) else inner:
    yield (*before, key)
    yield from places(one, *before, key)


def replaced(content: Any, place: tuple, value: Any) -> Any:
  """Returns a copy of a JSON value with another value at a place. None removes the value."""
  changed = copy.deepcopy(content)
  parent = changed
  for key in place[:-1]:
    parent = parent[key]
  if value is None:
    del parent[place[-1]]
  else:
    parent[place[-1]] = value
  return changed


def broken(content: Any) -> Iterator[Any]:
  """Yields other contents, and copies without one value, or with a value of another type."""
  yield from ("text", {"a": 1}, [1], b"\xff{")
  if isinstance(content, bytes):
    yield content[:-5]
    return
  rng, found = random.Random(0), list(places(content))
  for place in rng.sample(found, min(CHANGES, len(found))):
    for other in (None, 7, "other", []):
      yield replaced(content, place, other)


def check_reader(root, files: Mapping[str, Any], unread: tuple[str, ...], read: Callable) -> None:
  """Breaks each file of a release, and expects errors that name one of its files.

  Skips files whose names end in `unread`.
  `read` reads the release in `root`. It may accept a change, since readers ignore some fields.
  """
  for file in files:
    if file.endswith(unread):
      continue
    refusals = []
    releases.write(root, files)
    for content in (*broken(files[file]), None):
      if content is None:
        (root / file).unlink()
      else:
        releases.write(root, {file: content})
      try:
        read()
      except UserError as error:
        refusals.append(str(error))
    names = [name.rpartition("/")[2] for name in files]
    assert len(refusals) >= 4, file
    assert all(any(name in text for name in names) for text in refusals), refusals

"""Reads records from a function of the user, which `config.raw.source` names as FILE.py:FUNCTION.

The function gets `config.raw.options` as keyword arguments, and yields dicts with the fields of
`RawPair`. Their `image` is an array, [H, W, 3] uint8, or a function without arguments that draws
it, which is called later, in several threads.
"""

from collections.abc import Callable, Iterator
import hashlib
import itertools
import json
import pathlib
from typing import Any

import numpy as np

from cm3leon_jax.config import own_functions
from cm3leon_jax.data.sources.formats import SourcePart
from cm3leon_jax.data.sources.records import RawPair, Record, Rejected, checked_record, with_images
from cm3leon_jax.errors import UserError, short

KIND = "function"  # Kind of the parts of such a source.
PART_RECORDS = 2_000  # Maximum number of records per part. Each part becomes a raw shard.


def parts(source: str, options: dict[str, Any]) -> list[SourcePart]:
  """Splits the records into parts: up to PART_RECORDS consecutive records of one split.

  If the options or the file of the function change, all parts change. Files that this file imports
  are not compared.
  """
  file = pathlib.Path(source.rpartition(":")[0])
  found, start = [], 0
  for _, group in itertools.groupby(_call(source, options), lambda record: record.get("split")):
    end = start + sum(1 for _ in group)
    for first in range(start, end, PART_RECORDS):
      found.append((str(first), str(min(first + PART_RECORDS, end))))
    start = end
  content = file.read_bytes() + json.dumps(options, sort_keys=True).encode()
  stamp = hashlib.sha256(content).hexdigest()[:16]
  return [SourcePart(KIND, of_part, 0, stamp) for of_part in found]


class Reader:
  """Reads parts. In their order, it calls the function only once."""

  def __init__(self, source: str, options: dict[str, Any]):
    self._source, self._options = source, options
    self._records: Iterator[dict] = iter(())
    self._next: int | None = None

  def read(self, part: SourcePart) -> list[Record | Rejected]:
    """Returns the records of a part. Their images are inputs of `draw`."""
    start, end = map(int, part.files)
    if self._next is None or start < self._next:
      self._records, self._next = _call(self._source, self._options), 0
    some = itertools.islice(self._records, start - self._next, end - self._next)
    self._next = end
    return [self._checked(number, record) for number, record in enumerate(some, start)]

  def _checked(self, number: int, record: dict) -> Record | Rejected:
    values = {**record, "image": "drawn"}  # The checks are those of records in files.
    found = checked_record(RawPair, values, self._source, f"{self._source}, record {number}")
    return found if isinstance(found, Rejected) else with_images(found, [record["image"]])


def _call(source: str, options: dict[str, Any]) -> Iterator[dict]:
  """Yields the records of the function. Raises UserError for one without an image."""
  for number, record in enumerate(own_functions.load(source, "raw.source")(**options)):
    if not isinstance(record, dict) or "image" not in record:
      raise UserError(
        f"record {number} of {source} is {short(record)}; it must be a dict with the fields key, "
        "caption and image."
      )
    yield record


def draw(image: np.ndarray | Callable[[], np.ndarray]) -> np.ndarray:
  """Returns the pixels of a record's image, [H, W, 3] uint8."""
  pixels = np.asarray(image() if callable(image) else image)
  if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
    raise UserError(
      f"an image of config.raw.source has the shape {pixels.shape} and dtype {pixels.dtype}; it "
      "must have [H, W, 3] values of uint8."
    )
  return pixels

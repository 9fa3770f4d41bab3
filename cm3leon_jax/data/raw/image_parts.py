"""Limits the parts of image files that take far more time to decode than their bytes suggest.

Pillow reads segments, chunks, comments and stray bytes one by one, in Python. libjpeg visits all
blocks of an image in each scan. libavif searches all items for each item.
"""

import collections
from collections.abc import Iterator
import io
import re
from typing import Literal

from cm3leon_jax.errors import UserError

# A progressive JPEG file usually has about 10 scans, an AVIF file of 512 tiles 20 KB of tables.
MOST = {
  "scans": 100, "segments": 4_000, "boxes": 4_000, "bytes of tables": 2**16, "tag values": 2**18,
}  # fmt: skip
READS = 20_000  # Most reads of a small file. Pillow reads a chunk of a PNG file in about 3 reads.

# A marker of JPEG that begins a segment. Other markers have no length, and no effect on scans.
_MARKER = re.compile(rb"\xff([\xc0-\xcf\xd8-\xfe])")
# Boxes of AVIF that contain boxes, and the offset of these boxes.
_CONTAINERS = {b"meta": 12, b"iprp": 8, b"moov": 8, b"trak": 8, b"mdia": 8, b"minf": 8, b"stbl": 8}
_TABLES = {b"iloc", b"iinf", b"iref", b"ipma", b"grpl", b"stsc", b"stco", b"co64", b"stsz", b"stts"}


class ImageFile(io.BytesIO):
  """Image file for Pillow. Raises UserError, now or when it is read, if it has too many parts."""

  def __init__(self, data: bytes, what: str):
    """Opens `data`, which error messages call `what`."""
    super().__init__(data)
    self._what, self._left = what, READS + len(data) // 500
    counts: dict[str, int] = collections.Counter()
    parts = _jpeg_parts if data.startswith(b"\xff\xd8\xff") else _avif_parts
    parts = _tiff_parts if data.startswith((b"II", b"MM")) else parts
    for part, count in parts(data):
      counts[part] += count
      if counts[part] > MOST[part]:
        raise self._refused(f"more than {MOST[part]:,} {part}")

  def read(self, size: int | None = -1, /) -> bytes:
    self._left -= 1
    if self._left < 0:
      raise self._refused("too many segments, chunks, comments or stray bytes")
    return super().read(size)

  def _refused(self, why: str) -> UserError:
    return UserError(f"{self._what} has {why}: save it again with another program.")


def _jpeg_parts(data: bytes) -> Iterator[tuple[str, int]]:
  """Yields the segments and scans of a JPEG file up to the end of its first image."""
  place, has_scan = 0, False
  while marker := _MARKER.search(data, place):
    code, place = marker[1], marker.end()
    if code == b"\xd9" and has_scan:  # libjpeg reads nothing after it.
      return
    if code not in b"\xd8\xd9":  # Start and end of an image have no length.
      place += max(int.from_bytes(data[place : place + 2], "big"), 2)
    yield "segments", 1
    if code == b"\xda":
      has_scan = True
      yield "scans", 1


def _tiff_parts(data: bytes) -> Iterator[tuple[str, int]]:
  """Yields the values in the tags of the first image of a TIFF file, such as offsets of strips."""
  order: Literal["big", "little"] = "big" if data.startswith(b"MM") else "little"
  if 43 in data[2:4]:  # BigTIFF, whose sizes have 8 bytes.
    yield "tag values", len(data)
  place = int.from_bytes(data[4:8], order)
  for _ in range(int.from_bytes(data[place : place + 2], order)):
    kind, count = data[place + 4 : place + 6], int.from_bytes(data[place + 6 : place + 10], order)
    # 256 characters (kind 2) or bytes (1 and 7) take no more time than a number.
    yield "tag values", count // 256 if int.from_bytes(kind, order) in (1, 2, 7) else count
    place += 12


def _avif_parts(data: bytes) -> Iterator[tuple[str, int]]:
  """Yields the boxes of a file, also in other boxes, and the sizes of its tables, if it is AVIF."""
  waiting = [(0, len(data))] if data[4:8] == b"ftyp" else []
  while waiting:
    place, end = waiting.pop()
    while place + 8 <= end:
      size, kind = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
      if size == 1:
        size = int.from_bytes(data[place + 8 : place + 16], "big")
      size = min(size or end, end - place)  # 0: the box reaches to the end.
      yield ("bytes of tables", size) if kind in _TABLES else ("boxes", 1)
      if kind in _CONTAINERS:
        waiting.append((place + _CONTAINERS[kind], place + size))
      place += max(size, 8)

"""Tests that image files of many parts, which take far too long to decode, are refused."""

import io
import struct
import time
import zlib

import numpy as np
from PIL import Image
import pytest

from cm3leon_jax.data.raw import counting, reader
from cm3leon_jax.data.sources.records import RawPair
from cm3leon_jax.errors import UserError
from tests.data.raw.untrusted_test import FORMATS, encoded

SCAN = b"\xff\xda\x00\x08\x01\x01\x00\x01\x3f\x00"  # Of one component, without data.
COMMENT = b"\xff\xfe\x00\x03a"


def jpeg(before: bytes = b"", after: bytes = b"", **settings) -> bytes:
  """Returns a JPEG file with bytes after its start, and before its end."""
  buffer = io.BytesIO()
  Image.fromarray(np.full((16, 16), 9, np.uint8)).save(buffer, "JPEG", **settings)
  data = buffer.getvalue()
  return data[:2] + before + data[2:-2] + after + data[-2:]


def chunk(kind: bytes, content: bytes = b"") -> bytes:
  checked = kind + content
  return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))


def box(kind: bytes, content: bytes) -> bytes:
  return struct.pack(">I", len(content) + 8) + kind + content


GIF, PNG = encoded("gif"), encoded("png")
PALETTE = 13 + 768  # The end of the palette of a GIF file.
META = box(b"meta", bytes(4) + box(b"iprp", box(b"ipma", bytes(40_000))) * 2)
SLOW = {
  "more than 100 scans": [
    jpeg(after=SCAN * 200, progressive=True),
    jpeg(after=(b"\xff\x02" + SCAN) * 200, progressive=True),  # A marker without length.
    jpeg(b"\xff\xe1ftyp" + bytes(0x6674 - 4), SCAN * 200, progressive=True),  # Looks like AVIF.
  ],
  "more than 4,000 segments": [
    jpeg(COMMENT * 300_000),
    jpeg(b"\xff\xd9" + COMMENT * 300_000),  # Pillow reads on after an end without an image.
  ],
  "too many segments, chunks, comments or stray bytes": [
    jpeg(b"\xff" * 1_000_000),
    b"\xff\xd8" + b"\xff" * 1_000_000,
    jpeg(b"\xff\xd8" + bytes(1_000_000)),
    GIF[:PALETTE] + b"!\xfe\1a\0" * 300_000 + GIF[PALETTE:],
    GIF[:PALETTE] + b"!\xfe" + b"\1a" * 300_000 + b"\0" + GIF[PALETTE:],
    *(PNG[:at] + chunk(b"prVt") * 100_000 + PNG[at:] for at in (33, -12)),
    PNG[:33] + chunk(b"IDAT") * 100_000 + PNG[33:],
  ],
  "more than 262,144 tag values": [
    b"II*\0\10\0\0\0\1\0" + struct.pack("<HHII", 273, 4, 300_000, 22) + bytes(2_000_000),
  ],
  "more than 65,536 bytes of tables": [encoded("avif") + META],
}


@pytest.mark.parametrize("why", SLOW)
def test_a_file_of_many_parts_is_refused_before_they_take_time(why, tmp_path):
  path = tmp_path / "a.jpg"
  for data in SLOW[why]:
    path.write_bytes(data)
    began = time.process_time()
    for image in (data, path):
      with pytest.raises(UserError, match=f"^image .* has {why}: save it again"):
        reader.load_image(image, 8)
    list(counting._side(RawPair("a", str(path), "a")))
    assert time.process_time() - began < 1


def test_usual_files_are_read():
  """The limits are far from files that programs write."""
  exif = b"\xff\xe1" + struct.pack(">H", 60_000) + bytes(59_998)
  files = [encoded(kind, (500, 400)) for kind in FORMATS]
  files += [jpeg(exif * 200 + b"\xff" * 1_000, SCAN * 80 + COMMENT * 20, progressive=True)]
  files += [jpeg(restart_marker_blocks=1) + COMMENT * 9_000]  # libjpeg stops at the first end.
  for data in files:
    assert reader.load_image(data, 8).shape == (8, 8, 3)

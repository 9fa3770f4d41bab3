"""Tests that untrusted records are accepted or rejected, without crashes, hangs or much memory."""

import csv
import dataclasses
import functools
import io
import json
import os

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
from PIL import Image
import pyarrow as pa
from pyarrow import parquet
import pytest

from cm3leon_jax.config import UserError
from cm3leon_jax.data.raw import ingest, reader
from cm3leon_jax.data.raw.config import RawConfig
from cm3leon_jax.data.sources import lines as source_lines
from cm3leon_jax.data.sources.records import (
  KINDS,
  Record,
  RecordError,
  Rejected,
  images_of,
  make_record,
  parse_json,
)
from cm3leon_jax.files.shards import Runner
from tests.data.sources.formats_test import read
from tests.launched import python
from tests.refusals import refused

FORMATS = ("png", "jpeg", "webp", "gif", "avif")


@functools.cache
def encoded(kind: str, size=(24, 24)) -> bytes:
  pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8)
  buffer = io.BytesIO()
  Image.fromarray(pixels).save(buffer, kind)
  return buffer.getvalue()


def result_of(data: bytes):
  """Returns the pixels of an image, or None if it is rejected; any other error fails the test."""
  try:
    pixels = reader.load_image(data, 8)
  except UserError:
    return None
  assert pixels.shape == (8, 8, 3)
  return pixels


@pytest.mark.parametrize("kind", FORMATS)
def test_a_damaged_image_is_read_or_refused(kind):
  data, results = encoded(kind), []
  rng = np.random.default_rng(1)
  for _ in range(150):
    damaged = bytearray(data)
    for place in rng.integers(0, len(data), int(rng.integers(1, 4))):
      damaged[place] ^= 1 << int(rng.integers(8))
    results.append(result_of(bytes(damaged)) is None)
  assert result_of(data) is not None
  assert any(results)
  assert result_of(data[: len(data) // 2]) is None


@given(st.binary(max_size=200), st.sampled_from(FORMATS), st.integers(0, 40))
@settings(max_examples=150, deadline=None)
def test_any_bytes_are_read_or_refused(data, kind, kept):
  result_of(encoded(kind)[:kept] + data)


@pytest.mark.parametrize("kind", ["bmp", "tiff", "eps", "ppm", "dds", "pdf", "icns"])
def test_other_formats_are_refused(kind):
  with pytest.raises(UserError, match=r"cannot be read .* PNG, JPEG, WebP, GIF or AVIF"):
    reader.load_image(encoded(kind), 8)


def test_an_image_of_many_pixels_is_refused_before_it_is_decoded(monkeypatch):
  buffer = io.BytesIO()
  Image.new("1", (6_000, 6_000)).save(buffer, "png")
  assert len(buffer.getvalue()) < 10_000
  monkeypatch.setattr(Image.Image, "convert", None)  # Makes decoding an image raise an error.
  with pytest.raises(UserError, match=r"has 36,000,000 pixels; the maximum is 33,554,432\.$"):
    reader.load_image(buffer.getvalue(), 8)


def test_an_image_of_many_bytes_is_refused(tmp_path):
  with (tmp_path / "a.png").open("wb") as file:
    file.truncate(reader.MAX_BYTES + 1)
  with refused(UserError):
    reader.load_image(tmp_path / "a.png", 8)


def test_large_images_are_read_one_at_a_time(monkeypatch):
  """Only large images take the lock."""
  monkeypatch.setattr(reader, "LARGE", 600)
  small, large = encoded("png"), encoded("png", (30, 30))
  with reader._ONE_LARGE_IMAGE:
    reader.load_image(small, 8)
    entered = []
    monkeypatch.setattr(reader, "_ONE_LARGE_IMAGE", Entered(entered))
  reader.load_image(large, 8)
  assert entered == ["in", "out"]
  reader.load_image(small, 8)
  assert entered == ["in", "out"]


class Entered:
  def __init__(self, seen):
    self.seen = seen

  def __enter__(self):
    self.seen.append("in")

  def __exit__(self, *_):
    self.seen.append("out")


# Program that reads large images on 8 threads. Prints the memory that this took, in MiB, and the
# number of errors.
READ_LARGE = """
from concurrent import futures
import pathlib, resource, sys
from cm3leon_jax.config import UserError
from cm3leon_jax.data.raw import reader as raw_pairs
def peak():
  status = pathlib.Path("/proc/self/status")  # On Linux ru_maxrss begins with that of the parent.
  if not status.exists():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2**20
  return int(status.read_text().partition("VmHWM:")[2].split()[0]) // 2**10
def read(path):
  try:
    return raw_pairs.load_image(path, 8)
  except UserError as error:
    return error
before = peak()
with futures.ThreadPoolExecutor(8) as pool:
  found = list(pool.map(read, [sys.argv[1]] * 16))
print(peak() - before, sum(isinstance(x, UserError) for x in found))
"""


@pytest.mark.slow
@pytest.mark.parametrize("is_damaged", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_large_images_on_many_threads_take_the_memory_of_one(tmp_path, is_damaged):
  """An image takes 200 MiB. Regression: 8 threads took 680 MiB, or 980 MiB for damaged images."""
  path = tmp_path / "a.png"
  Image.new("RGBA", (4_000, 4_000), (9, 8, 7, 128)).save(path, compress_level=1)
  if is_damaged:
    path.write_bytes(path.read_bytes()[:-1_000])
  run = python(READ_LARGE, path, check=True)
  size, errors = map(int, run.stdout.split())
  assert errors == (16 if is_damaged else 0)
  assert size < 350


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path):
  os.mkfifo(tmp_path / "pipe.png")
  for path in (tmp_path / "pipe.png", tmp_path, "/dev/zero"):
    with refused(UserError):
      reader.load_image(path, 8)


def reasons(items) -> list[str]:
  """Returns, for each item, the reason of a rejection or the key of a record."""
  return [item.reason if isinstance(item, Rejected) else item.key for item in items]


WRONG_LINES = (
  b'{"key": "a", "text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
  b'{"key": "a", "text": ' + b"1" * 5_000 + b"}",
  '{"key": "a", "text": "é"}'.encode("latin-1"),
  b'{"key": "a", "text": "\\ud800"}',
  b'{"key": "\\ud800", "text": "b"}',
  b'{"key": "a", "text": "' + b"x" * 2_000_000 + b'"}',
  b"\x00\xff",
  b"[1]",
)


@pytest.mark.parametrize("line", WRONG_LINES, ids=range(len(WRONG_LINES)))
def test_a_wrong_line_is_rejected_and_the_next_one_is_read(line, tmp_path, monkeypatch):
  monkeypatch.setattr(source_lines, "MAX_LINE", 1_000_000)
  (tmp_path / "a.jsonl").write_bytes(line + b'\n{"key": "right", "text": "b"}\n')
  found = list(read(tmp_path / "a.jsonl"))
  assert reasons(found) == ["malformed_record", "right"]
  config = RawConfig(source=str(tmp_path / "a.jsonl"), max_rejected=0.5)
  ingest.prepare(config, ingest.parts_of(config), tmp_path / "raw", Runner())
  [rejected] = (tmp_path / "raw" / ingest.REJECTED).read_text().splitlines()
  assert json.loads(rejected)["reason"] == "malformed_record"


CSV = "file_name,text\n"


@pytest.mark.parametrize(
  ("rows", "expected"),
  [
    (f'{CSV}a.png,one\na.png,"two\na.png,three\n', ["a.png", "unreadable_file"]),
    (f"{CSV}a.png,one\na.png,{'x' * 2_000}\n", ["a.png", "unreadable_file"]),
    (f"{CSV}a.png,one\na.png,caf\xe9\n".encode("latin-1"), ["unreadable_file"]),
    # Python's default limit for a CSV field is 131,072.
    (f"{CSV}a.png,{'x' * 200_000}\n", ["a.png"]),
  ],
)
def test_what_is_no_csv_is_rejected_from_there_on(rows, expected, tmp_path, monkeypatch):
  if "unreadable_file" in expected:
    monkeypatch.setattr(source_lines, "MAX_ROW", 1_000)
  (tmp_path / "a.png").write_bytes(encoded("png"))
  (tmp_path / "metadata.csv").write_bytes(rows if isinstance(rows, bytes) else rows.encode())
  limit = csv.field_size_limit()
  try:
    found = list(read(tmp_path))
  finally:
    csv.field_size_limit(limit)
  assert reasons(found) == expected
  for item in found:
    assert not isinstance(item, Rejected) or "metadata.csv, line" in item.message


def test_a_row_of_parquet_that_is_no_text_is_rejected_alone(tmp_path):
  raw = pa.array([b"one", b"\xff\xfe", b"three"], pa.binary())
  texts = pa.StringArray.from_buffers(3, *raw.buffers()[1:], raw.buffers()[0])
  images = [encoded("png")] * 3
  parquet.write_table(pa.table({"image": images, "caption": texts}), tmp_path / "a.parquet")
  found = reasons(read(tmp_path / "a.parquet"))
  assert found == ["a.parquet/0", "malformed_record", "a.parquet/2"]


def test_a_column_that_is_no_field_is_not_read(tmp_path):
  dates = pa.array([0, 2**50, 1], pa.timestamp("ms"))
  images = [encoded("png")] * 3
  table = pa.table({"image": images, "caption": ["a", "b", "c"], "date": dates})
  parquet.write_table(table, tmp_path / "a.parquet")
  found = reasons(read(tmp_path / "a.parquet"))
  # Reading the date that is out of range would raise an error.
  assert found == [f"a.parquet/{i}" for i in range(3)]


def test_a_damaged_parquet_file_stops_nothing(tmp_path):
  table = pa.table({"image": [encoded("png")] * 8, "caption": [f"a {i}" for i in range(8)]})
  parquet.write_table(table, tmp_path / "a.parquet")
  data, rng, found = (tmp_path / "a.parquet").read_bytes(), np.random.default_rng(0), set()
  # The footer contains the names, types and offsets of the columns; its length precedes "PAR1".
  footer = int.from_bytes(data[-8:-4], "little") + 8
  for _ in range(300):
    damaged = bytearray(data)
    damaged[-int(rng.integers(1, footer))] ^= 1 << int(rng.integers(8))
    (tmp_path / "a.parquet").write_bytes(damaged)
    found.update(reasons(read(tmp_path / "a.parquet")))
  assert {"a.parquet/0", "unreadable_file"} <= found


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path):
  (tmp_path / "a.png").write_bytes(encoded("png"))
  (tmp_path / "metadata.csv").write_text(f"{CSV}a.png,one\n", encoding="utf-8-sig")
  (tmp_path / "texts.jsonl").write_text('{"key": "b", "text": "c"}\n', encoding="utf-8-sig")
  assert reasons(read(tmp_path)) == ["a.png", "b"]


def test_columns_of_parquet_of_other_types_are_rejected(tmp_path):
  table = pa.table({"image": [encoded("png")] * 2, "caption": [[b"a"], [b"b"]]})
  parquet.write_table(table, tmp_path / "a.parquet")
  assert reasons(read(tmp_path / "a.parquet")) == ["malformed_record"] * 2


@pytest.mark.parametrize("name", ["../outside/a.png", "\0"])
def test_a_record_with_an_image_outside_of_the_folder_is_rejected_alone(tmp_path, name):
  folder = tmp_path / "inside"
  for place in (folder, tmp_path / "outside"):
    place.mkdir()
    (place / "a.png").write_bytes(encoded("png"))
  with (folder / "pairs.jsonl").open("w") as file:
    for key, image in (("x", name), ("y", "a.png")):
      file.write(json.dumps({"key": key, "image": image, "caption": "a"}) + "\n")
  assert reasons(read(folder)) == ["outside_image", "y"]
  if name != "\0":
    config = RawConfig(source=str(folder), resolution=4, allow_outside=True)
    counts = ingest.prepare(config, ingest.parts_of(config), tmp_path / "raw", Runner())
    assert counts["train_pairs"] + counts["heldout_pairs"] == 2


VALUES = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(max_size=4),
  lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
  max_leaves=6,
)
RIGHT = {
  "pairs": {"key": "a", "image": "a.png", "caption": "b", "split": "train", "facts": {"n": [1]}},
  "texts": {"key": "a", "text": "b", "source": "c"},
  "interleaved": {"key": "a", "segments": [{"text": "b"}, {"image": "a.png"}], "group": "d"},
}


def can_be_written(kind: str, values: dict) -> bool:
  """Returns whether ingestion accepts a record with these values; if so, writes it."""
  try:
    record = make_record(KINDS[kind], values, "here")
  except RecordError as error:
    json.dumps(str(error))
    return False
  assert isinstance(record, Record)
  if not any(isinstance(image, bytes) for image in images_of(record)):
    json.dumps(dataclasses.asdict(record), ensure_ascii=False).encode()
  return True


@pytest.mark.parametrize("kind", RIGHT)
def test_any_field_makes_a_record_or_is_rejected(kind):
  results = []

  @given(st.sampled_from(sorted(RIGHT[kind])), VALUES)
  @settings(max_examples=150, deadline=None)
  def check(field, value):
    results.append(can_be_written(kind, {**RIGHT[kind], field: value}))

  check()
  assert set(results) == {True, False}


def nested(levels: int):
  return {"a": nested(levels - 1)} if levels else 1


@pytest.mark.parametrize(
  ("facts", "right"),
  [
    (nested(50), True), (nested(51), False), (nested(900), False), ({"a": [b"b"]}, False),
    ({"a": "\ud800"}, False), ({"a": [[[{"b": 1.5}]]]}, True),
  ],
)  # fmt: skip
def test_facts_are_json_of_few_levels(facts, right):
  assert can_be_written("pairs", {**RIGHT["pairs"], "facts": facts}) == right


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_any_line_is_an_object_or_rejected(line):
  try:
    found = parse_json(line, "here", ["key"])
  except RecordError:
    return
  assert isinstance(found, dict)

"""Tests that untrusted images and records are accepted or rejected, without crashes or hangs."""

import dataclasses
import functools
import io
import json
import os

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
from PIL import Image
import pytest

from cm3leon_jax.config.data import RawConfig
from cm3leon_jax.data.raw import ingest, reader
from cm3leon_jax.data.sources.records import (
  KINDS,
  Record,
  RecordError,
  Rejected,
  images_of,
  make_record,
)
from cm3leon_jax.errors import UserError
from cm3leon_jax.stages.shards import Runner
from tests.data.sources.formats_test import read
from tests.refusals import refused

FORMATS = ("png", "jpeg", "webp", "gif", "avif", "bmp", "tiff")


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


OTHERS = {"empty": b"", "HEIC": b"\0\0\0\x18ftypheic\0\0\0\0mif1"}


@pytest.mark.parametrize("kind", ["eps", "ppm", "dds", "pdf", "icns", *OTHERS])
def test_other_formats_are_refused(kind):
  usual = ("PNG, JPEG, WebP, GIF, AVIF, BMP or TIFF", "another format")
  with refused(UserError, *((kind,) if kind in OTHERS else usual)):
    reader.load_image(OTHERS[kind] if kind in OTHERS else encoded(kind), 8)


def test_a_large_jpeg_is_decoded_at_half_its_size(monkeypatch):
  pixels = np.zeros((300, 200, 3), np.uint8)
  pixels[:150] = 255
  buffer, exif = io.BytesIO(), Image.Exif()
  exif[0x0112] = 6  # Turned to the right: the white half is on the right.
  Image.fromarray(pixels).save(buffer, "jpeg", exif=exif)
  whole, size = reader.load_with_size(buffer.getvalue(), 8)
  monkeypatch.setattr(reader, "LARGE", 100)
  monkeypatch.setattr(reader, "MAX_PIXELS", 50_000)
  half, same = reader.load_with_size(buffer.getvalue(), 8)
  assert size == same == (300, 200)
  np.testing.assert_allclose(half, whole, atol=6)
  assert reader.load_image(buffer.getvalue(), None).shape == (100, 150, 3)
  monkeypatch.setattr(reader, "MAX_JPEG_PIXELS", 59_999)
  with refused(UserError, "60,000 pixels", "59,999"):
    reader.load_image(buffer.getvalue(), 8)


def test_an_image_of_many_pixels_is_refused_before_it_is_decoded(monkeypatch):
  buffer = io.BytesIO()
  Image.new("1", (6_000, 6_000)).save(buffer, "png")
  assert len(buffer.getvalue()) < 10_000
  monkeypatch.setattr(Image.Image, "convert", None)  # Makes decoding an image raise an error.
  with pytest.raises(UserError, match=r"has 36,000,000 pixels; the maximum is 33,554,432\.$"):
    reader.load_image(buffer.getvalue(), 8)


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


def test_what_is_no_file_or_too_large_is_refused_and_not_read(tmp_path):
  os.mkfifo(tmp_path / "pipe.png")
  with (tmp_path / "large.png").open("wb") as file:
    file.truncate(reader.MAX_BYTES + 1)
  for path in ("pipe.png", "", "/dev/zero", "large.png"):
    with refused(UserError, str(tmp_path / path), "bytes" if path == "large.png" else ""):
      reader.load_image(tmp_path / path, 8)


def reasons(items) -> list[str]:
  """Returns, for each item, the reason of a rejection or the key of a record."""
  return [item.reason if isinstance(item, Rejected) else item.key for item in items]


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

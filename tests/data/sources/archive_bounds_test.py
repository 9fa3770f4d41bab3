"""Tests that records cannot read other files, and that damaged sources are read or rejected."""

import os
import pathlib

from hypothesis import example, given, settings
from hypothesis import strategies as st
import pyarrow as pa
from pyarrow import parquet
import pytest

from cm3leon_jax.data.raw import reader
from cm3leon_jax.data.sources import formats
from cm3leon_jax.data.sources.records import RawPair, RawText, Record, Rejected, batches
from cm3leon_jax.errors import UserError
from cm3leon_jax.files.atomic import open_filesystem
from tests.data.raw.untrusted_test import encoded, reasons
from tests.data.sources.formats_test import jpeg, read, sample, write_tar
from tests.refusals import refused


def test_a_batch_is_bounded_in_bytes():
  items = [RawPair(str(i), b"x" * 40, "a") for i in range(5)] + [RawText("t", "a")] * 4
  items.insert(2, Rejected("f", "", "r", "m"))
  found = list(batches(items, 4, 100))
  assert [len(batch) for batch in found] == [4, 4, 2]
  assert [item for batch in found for item in batch] == items
  assert [len(batch) for batch in batches(items[:3], 9, 1)] == [1, 1, 1]


def test_lists_that_are_links_or_pipes_are_not_read(tmp_path):
  """Regression: links revealed whether a file exists, and its lines; reading a pipe never ended."""
  (tmp_path / "secret").write_text('{"key": "s", "text": "secret"}\n')
  folder = tmp_path / "set"
  folder.mkdir()
  (folder / "a.png").write_bytes(encoded("png"))
  (folder / "pairs.jsonl").write_text('{"key": "a", "image": "a.png", "caption": "b"}\n')
  (folder / "interleaved.jsonl").symlink_to(tmp_path / "nothing")
  (folder / "texts.jsonl").symlink_to(tmp_path / "secret")
  found = list(read(folder))
  assert reasons(found) == ["linked_file", "linked_file", "a"]
  # The message does not reveal whether the linked file exists.
  assert len({x.message.replace("interleaved", "texts") for x in found[:2]}) == 1
  (folder / "texts.jsonl").unlink()
  os.mkfifo(folder / "texts.jsonl")
  assert reasons(read(folder)) == ["linked_file", "linked_file", "a"]


def test_a_chain_of_urls_is_a_name(tmp_path, monkeypatch):
  """Regression: fsspec read the file name `a::1.png` as a file in an archive."""
  (tmp_path / "a::1.png").write_bytes(encoded("png"))
  (tmp_path / "captions.jsonl").write_text('{"image": "a::1.png", "caption": "b"}\n')
  [item] = read(tmp_path)
  assert item == RawPair("a::1.png", str(tmp_path / "a::1.png"), "b")
  assert reader.load_image(item.image, 8).shape == (8, 8, 3)
  fs, path = open_filesystem("a::b")
  assert path == str(pathlib.Path("a::b").absolute())
  assert fs.protocol == ("file", "local")
  for url in ("gs://b/a::http://c/1.png", "zip://a.png::/tmp/b.zip"):
    with refused(UserError, "::"):
      reader.load_image(url, 8)


def test_zero_is_a_key(tmp_path):
  table = pa.table({"id": [0, 1, None], "image": [jpeg(1)] * 3, "caption": ["a"] * 3})
  parquet.write_table(table, tmp_path / "a.parquet")
  # pandas stores a column of integers with a missing value as floats.
  assert reasons(read(tmp_path / "a.parquet")) == ["0", "1", "a.parquet/2"]
  (tmp_path / "b.jsonl").write_text('{"id": 0, "text": "x"}\n{"id": "", "text": "y"}\n')
  assert reasons(read(tmp_path / "b.jsonl")) == ["0", "b.jsonl/1"]
  folder = tmp_path / "set"
  folder.mkdir()
  (folder / "a.png").write_bytes(encoded("png"))
  lines = '{"id": 0, "image": "a.png", "text": "b"}\n{"image": "a.png", "text": "b"}\n'
  (folder / "metadata.jsonl").write_text(lines)
  assert reasons(read(folder)) == ["0", "a.png"]


FILES = {
  "a.tar": lambda path: write_tar(path, [*sample(1), *sample(2)]),
  "a.jsonl": lambda path: path.write_text('{"key": "a", "text": "b"}\n{"id": 3, "text": "c"}\n'),
  "a.txt": lambda path: path.write_text("one\ntwo\n"),
}
FILES["set/metadata.csv"] = lambda path: path.write_text('file_name,text\na.png,"one, two"\n')
FILES["set/pairs.jsonl"] = lambda path: path.write_text(
  '{"key": "a", "image": "a.png", "caption": "b", "facts": {"n": [1]}}\n'
)
FILES["set/interleaved.jsonl"] = lambda path: path.write_text(
  '{"key": "a", "segments": [{"text": "b"}, {"image": "a.png"}]}\n'
)


@pytest.fixture(scope="module", params=FILES)
def source(request, tmp_path_factory):
  """Returns a file of a source, and the path to open: the file or its folder."""
  file = tmp_path_factory.mktemp("source") / request.param
  file.parent.mkdir(exist_ok=True)
  FILES[request.param](file)
  if file.parent.name == "set":
    (file.parent / "a.png").write_bytes(encoded("png"))
    return file, file.parent
  return file, file


@given(
  changes=st.lists(st.tuples(st.integers(0, 2_000), st.binary(max_size=6)), max_size=3),
  cut=st.integers(0, 3_000),
)
@example(changes=[(0, b"\xff\xfe\x00")], cut=3_000)
@example(changes=[(0, b"\x1f\x8b\x08")], cut=3_000)
@example(changes=[(124, b"\x80\xff\xff\xff\xff\xff")], cut=3_000)  # A member size in base 256.
@example(changes=[(156, b"S")], cut=3_000)  # A sparse member.
@example(changes=[], cut=0)
@settings(max_examples=60, deadline=None)
def test_a_damaged_source_gives_records_or_says_what_is_wrong(source, changes, cut):
  file, path = source
  whole = file.read_bytes()
  damaged = bytearray(whole[:cut])
  for place, data in changes:
    damaged[place : place + len(data)] = data
  try:
    file.write_bytes(damaged)
    for part in formats.parts(str(path)):
      assert all(isinstance(item, Record | Rejected) for item in formats.read(part))
  finally:
    file.write_bytes(whole)

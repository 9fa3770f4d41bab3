"""Tests that untrusted archives and lists can neither exhaust memory nor read other files."""

import csv
import json
import os
import pathlib
import tarfile

from hypothesis import example, given, settings
from hypothesis import strategies as st
import numpy as np
import pyarrow as pa
from pyarrow import parquet
import pytest

from cm3leon_jax.config import UserError
from cm3leon_jax.data.raw import ingest, reader
from cm3leon_jax.data.raw.config import RawConfig
from cm3leon_jax.data.sources import archives, formats, records
from cm3leon_jax.data.sources import lines as source_lines
from cm3leon_jax.data.sources.records import RawPair, RawText, Record, Rejected, batches
from cm3leon_jax.files.atomic import open_filesystem
from cm3leon_jax.files.shards import Runner
from tests.data.raw.untrusted_test import encoded, reasons
from tests.data.sources.formats_test import jpeg, read, sample, write_tar
from tests.launched import python
from tests.refusals import refused

MIB = 2**20
LONG = 100 * MIB
# Program that reads a source. Prints the memory that this took, in MiB, the number of items, and
# the kinds of items: "right" or the reason of a rejection.
READ = """
import pathlib, resource, sys
from cm3leon_jax.data.sources import formats as sources
from cm3leon_jax.data.sources.records import Rejected
if sys.argv[1].endswith(".parquet"):
  import pyarrow.parquet
def peak():
  status = pathlib.Path("/proc/self/status")  # On Linux ru_maxrss begins with that of the parent.
  if not status.exists():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2**20
  return int(status.read_text().partition("VmHWM:")[2].split()[0]) // 2**10
[part] = sources.parts(sys.argv[1])
before, reasons, count = peak(), set(), 0
for item in sources.read(part):
  count += 1
  reasons.add(item.reason if isinstance(item, Rejected) else "right")
print(peak() - before, count, *sorted(reasons))
"""


def cost(path) -> tuple[int, list[str]]:
  """Reads a source in a new process; returns (memory in MiB, [number of items, kinds of items])."""
  run = python(READ, path, check=True)
  size, *rest = run.stdout.split()
  return int(size), rest


def test_a_long_row_of_csv(tmp_path):
  """Regression: reading took twice the row's length in memory."""
  (tmp_path / "a.png").write_bytes(encoded("png"))
  with (tmp_path / "metadata.csv").open("w") as file:
    file.write('file_name,text\na.png,one\na.png,"' + "x" * LONG)
  size, found = cost(tmp_path)
  assert found == ["2", "right", "unreadable_file"]
  assert size < 50


@pytest.fixture
def _limit_of_csv():
  """Restores the size limit of CSV fields, which is global in a process."""
  limit = csv.field_size_limit()
  yield
  csv.field_size_limit(limit)


@pytest.mark.usefixtures("_limit_of_csv")
def test_a_row_of_csv_over_many_lines_is_bounded(tmp_path, monkeypatch):
  monkeypatch.setattr(source_lines, "MAX_ROW", 100)
  (tmp_path / "a.png").write_bytes(encoded("png"))
  lines = 'file_name,text\na.png,one\na.png,"' + "\n".join(["y" * 40] * 3) + '"\na.png,three\n'
  (tmp_path / "metadata.csv").write_text(lines)
  [right, wrong] = read(tmp_path)
  assert (right.caption, wrong.reason) == ("one", "unreadable_file")
  assert "a row of more than 100 characters" in wrong.message


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_a_long_header_of_a_tar(tmp_path, kind):
  """Regression: reading took twice the header's length in memory."""
  write_tar(tmp_path / "a.tar", sample(1))
  info = tarfile.TarInfo("long")
  info.type, info.size = kind, LONG
  members = (tmp_path / "a.tar").read_bytes().rstrip(b"\0")
  with (tmp_path / "a.tar").open("wb") as file:
    file.write(members + bytes(-len(members) % 512) + info.tobuf(tarfile.GNU_FORMAT))
    file.truncate(file.tell() + LONG + 1_024)
  size, found = cost(tmp_path / "a.tar")
  assert found == ["1", "unreadable_file"]
  assert size < 50


def test_headers_of_many_members_are_not_kept(tmp_path):
  """Regression: the 5,000 headers of each of the 60 members stayed in memory."""
  with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
    tar.pax_headers = {}
    for i in range(60):
      info = tarfile.TarInfo(f"{i}.dat")
      info.pax_headers = {f"k{i}-{j}": "v" * 30 for j in range(5_000)}
      tar.addfile(info)
  size, found = cost(tmp_path / "a.tar")
  assert found == ["0"]
  assert size < 30


@pytest.fixture(scope="module")
def noise():
  return np.random.default_rng(0).bytes(MIB)


def write_table(path, images, **options):
  captions = [f"a {i}" for i in range(len(images))]
  table = pa.table({"image": images, "caption": captions})
  parquet.write_table(table, path, store_schema=False, row_group_size=len(images), **options)


def test_a_large_group_of_rows_in_parquet(tmp_path, noise):
  """Regression: a row group of 160 MiB was read at once."""
  images = [bytes([i]) + noise for i in range(100)]
  write_table(tmp_path / "a.parquet", images, use_dictionary=False, write_batch_size=1)
  size, found = cost(tmp_path / "a.parquet")
  assert found == ["100", "right"]
  assert size < 60


def test_a_value_that_a_dictionary_repeats(tmp_path, noise):
  """Regression: each of 64 rows had its own copy of one value of 4 MiB."""
  repeated = pa.DictionaryArray.from_arrays(
    pa.array([0] * 64, pa.int32()), pa.array([noise * 4], pa.binary())
  )
  write_table(tmp_path / "a.parquet", repeated, dictionary_pagesize_limit=2**27)
  assert (tmp_path / "a.parquet").stat().st_size < 5 * MIB
  size, found = cost(tmp_path / "a.parquet")
  assert found == ["64", "right"]
  assert size < 100


def test_a_group_of_rows_that_is_too_large_is_passed_over(tmp_path, monkeypatch):
  monkeypatch.setattr(archives, "MAX_GROUP", 10_000)
  schema = pa.schema({"image": pa.binary(), "caption": pa.string(), "vector": pa.binary()})
  with parquet.ParquetWriter(tmp_path / "a.parquet", schema) as writer:
    # The size of column `vector` does not count, because it is not read.
    for size in (10, 20_000, 10):
      rows = {"image": [b"x" * size] * 2, "caption": ["a"] * 2, "vector": [bytes(30_000)] * 2}
      writer.write_table(pa.table(rows, schema))
  found = list(read(tmp_path / "a.parquet"))
  assert reasons(found) == [
    "a.parquet/0", "a.parquet/1", "large_file", "a.parquet/4", "a.parquet/5",
  ]  # fmt: skip
  assert "the 2 rows from 2 on have 20,108 bytes" in found[2].message
  assert "row group is 10,000: write smaller row groups." in found[2].message


REPEATED = 100_000  # Number of characters of the repeated text.


@pytest.fixture
def characters(monkeypatch):
  """Returns a counter of the characters of all texts that become fields of records."""
  seen, check = [], records._check_value

  def counted(name, value, *others):
    if isinstance(value, str):
      seen.append(len(value))
    check(name, value, *others)

  monkeypatch.setattr(records, "_check_value", counted)
  return seen


def write_repeated(path, **columns):
  """Writes 300 rows in two row groups; texts of 30 MB are repeated, so the file has some kB."""
  options = {"compression": "zstd", "row_group_size": 200}
  parquet.write_table(pa.table({k: [v] * 300 for k, v in columns.items()}), path, **options)
  assert path.stat().st_size < 30_000


@pytest.mark.parametrize("name", ["caption", "TEXT"])
def test_of_a_long_caption_in_parquet_no_text_is_made(tmp_path, name, characters):
  """Regression: a file of 1.3 kB with 2,000 captions of 1 MB took 72 s to read."""
  write_repeated(tmp_path / "a.parquet", image=encoded("png"), **{name: "é" * REPEATED})
  write_table(tmp_path / "b.parquet", [encoded("png")])
  config = RawConfig(source=str(tmp_path / "*.parquet"), resolution=4, max_rejected=1)
  ingest.prepare(config, ingest.parts_of(config), tmp_path / "raw", Runner())
  lines = (tmp_path / "raw" / ingest.REJECTED).read_text().splitlines()
  rejected = [json.loads(line) for line in lines]
  assert [x["reason"] for x in rejected] == ["long_caption"] * 300
  assert rejected[7]["message"] == (
    "key 'a.parquet/7': the caption has 100000 characters, but raw.max_caption_characters is 2000."
  )
  assert sum(characters) < REPEATED
  # Without a limit, these captions are accepted.
  assert len(next(read(tmp_path / "a.parquet")).caption) == REPEATED
  assert sum(characters) >= REPEATED


def test_the_first_caption_of_a_row_counts_and_texts_may_be_long(tmp_path):
  long = "x" * 50
  columns = {"image": encoded("png"), "caption": "short", "text": long}
  write_repeated(tmp_path / "a.parquet", **columns)
  [part] = formats.parts(str(tmp_path / "a.parquet"))
  assert {x.caption for x in formats.read(part, longest_caption=9)} == {"short"}
  write_repeated(tmp_path / "a.parquet", text=long)
  assert {x.text for x in formats.read(part, longest_caption=9)} == {long}


@pytest.mark.parametrize("name", ["text", "license"])
def test_values_that_a_dictionary_repeats_are_bounded_together(
  tmp_path, name, characters, monkeypatch
):
  monkeypatch.setattr(archives, "MAX_GROUP", 10 * REPEATED)
  write_repeated(tmp_path / "a.parquet", **{"text": "a", name: "x" * REPEATED})
  found = reasons(read(tmp_path / "a.parquet"))
  first = [f"a.parquet/{i}" for i in range(9)]
  second = [f"a.parquet/{i}" for i in range(200, 209)]
  assert found == [*first, "large_file", *second, "large_file"]
  assert sum(characters) < 20 * REPEATED


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
    with refused(UserError):
      open_filesystem(url)
    with refused(UserError):
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

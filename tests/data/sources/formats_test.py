"""Tests that all formats give the same records and report the same wrong records."""

import io
import json
import tarfile

import fsspec
import numpy as np
from PIL import Image
import pyarrow as pa
from pyarrow import parquet
import pytest

from cm3leon_jax.config.data import RawConfig
from cm3leon_jax.data.raw import ingest, reader
from cm3leon_jax.data.sources import formats
from cm3leon_jax.data.sources.records import RawPair, RawText
from cm3leon_jax.errors import UserError
from cm3leon_jax.stages.shards import Runner
from tests.refusals import refused


def read(source, kind="auto"):
  for part in formats.parts(source, kind):
    yield from formats.read(part)


def prepare(folder, **fields):
  config = RawConfig(resolution=4, **fields)
  return ingest.prepare(config, ingest.parts_of(config), folder, Runner())


def jpeg(value: int) -> bytes:
  buffer = io.BytesIO()
  Image.new("RGB", (8, 8), (value, value, value)).save(buffer, "jpeg", quality=95)
  return buffer.getvalue()


def write_tar(path, members):
  with tarfile.open(path, "w") as tar:
    for name, data in members:
      info = tarfile.TarInfo(name)
      info.size = len(data)
      tar.addfile(info, io.BytesIO(data))


def sample(i: int, **about) -> list:
  name = f"{i:09d}"
  usual = {"key": name, "url": f"https://example.org/{i}.jpg", "status": "success", "width": 8}
  about = {**usual, "license": "CC0-1.0", **about}
  return [
    (f"{name}.jpg", jpeg(i)),
    (f"{name}.txt", f"gray {i}".encode()),
    (f"{name}.json", json.dumps(about).encode()),
  ]


def test_webdataset(tmp_path):
  write_tar(tmp_path / "00000.tar", sample(0) + sample(1, author="Ada"))
  write_tar(tmp_path / "00001.tar", sample(2))
  items = list(read(str(tmp_path)))
  assert items[1] == RawPair(
    "000000001", jpeg(1), "gray 1", "https://example.org/1.jpg", "CC0-1.0", "Ada"
  )
  assert [i.key for i in items] == ["000000000", "000000001", "000000002"]
  assert [i.key for i in read(str(tmp_path / "*1.tar"))] == ["000000002"]
  assert list(read(f"file://{tmp_path}/00001.tar")) == items[2:]


@pytest.mark.parametrize("name", ["captions.csv", "metadata.jsonl"])
def test_folder_with_captions(tmp_path, name):
  (tmp_path / "sub").mkdir()
  (tmp_path / "sub" / "a.jpg").write_bytes(jpeg(9))
  rows = [
    {"file_name": "sub/a.jpg", "text": 'a "gray", box'},
    {"file_name": "sub/b.jpg", "text": "gone"},
  ]
  if name.endswith("csv"):
    (tmp_path / name).write_text('file_name,text\nsub/a.jpg,"a ""gray"", box"\nsub/b.jpg,gone\n')
  else:
    (tmp_path / name).write_text("".join(json.dumps(r) + "\n" for r in rows))
  pair, rejected = read(str(tmp_path))
  assert pair == RawPair("sub/a.jpg", str(tmp_path / "sub" / "a.jpg"), 'a "gray", box')
  assert (rejected.reason, rejected.key) == ("missing_image", "sub/b.jpg")
  assert (reader.load_image(pair.image, 4) == 9).all()


def test_parquet(tmp_path):
  (tmp_path / "a.jpg").write_bytes(jpeg(3))
  parquet.write_table(
    pa.table({"id": ["x", "y"], "jpg": [jpeg(1), None], "TEXT": ["one", "two"]}),
    tmp_path / "0.parquet",
  )
  parquet.write_table(
    pa.table({"image_path": ["a.jpg", "no.jpg"], "caption": ["three", "four"]}),
    tmp_path / "1.parquet",
  )
  struct = [{"bytes": jpeg(5), "path": "ignored.jpg"}]
  parquet.write_table(
    pa.table({"image": struct, "text": ["five"], "author": ["Ada"]}), tmp_path / "2.parquet"
  )
  parquet.write_table(pa.table({"text": ["only text"]}), tmp_path / "3.parquet")
  (tmp_path / "4.parquet").write_bytes(b"PAR1")
  items = list(read(str(tmp_path), "parquet"))
  assert items[0] == RawPair("x", jpeg(1), "one")
  assert items[2] == RawPair("1.parquet/0", str(tmp_path / "a.jpg"), "three")
  assert items[4] == RawPair("2.parquet/0", jpeg(5), "five", attribution="Ada")
  assert items[5] == RawText("3.parquet/0", "only text")
  reasons = [(items[i].key, items[i].reason) for i in (1, 3, 6)]
  expected = [("y", "malformed_record"), ("1.parquet/1", "missing_image")]
  assert reasons == [*expected, ("", "unreadable_file")]


def test_texts(tmp_path):
  (tmp_path / "a.txt").write_text("One text.\nOf two lines.")
  (tmp_path / "b.jsonl").write_text(
    '{"text": "Two."}\n\n{"text": "", "id": "e"}\n{"id": "z", "text": "Three.", "url": "u"}\n'
  )
  items = list(read(str(tmp_path)))
  assert items[0] == RawText("a.txt", "One text.\nOf two lines.", source=str(tmp_path / "a.txt"))
  assert [i.key for i in items] == ["a.txt", "b.jsonl/0", "e", "z"]
  assert (items[2].reason, items[3].source) == ("empty_text", "u")


def test_absent_and_unknown_sources_are_refused(tmp_path):
  with refused(UserError, "config.raw.source", "none"):
    list(read(str(tmp_path / "none")))
  (tmp_path / "a.jpg").write_bytes(jpeg(0))
  with refused(UserError, "no texts and no captions"):
    list(read(str(tmp_path)))
  with refused(UserError, ".tar"):
    list(read(str(tmp_path), "webdataset"))
  for source in ("nothing://x/y", "hf://datasets/x", "https://example.org/x.zip"):
    with refused(UserError, "config.raw.source", source, "gs://"):
      list(read(source))


def test_sources_need_not_be_on_a_disk(tmp_path):
  """fsspec's memory file system replaces a GCS bucket."""
  fs = fsspec.filesystem("memory")
  fs.pipe("/bucket/tars/0.tar", b"")
  with (
    fs.open("/bucket/tars/0.tar", "wb") as stream,
    tarfile.open(fileobj=stream, mode="w|") as tar,
  ):
    for name, data in sample(7):
      info = tarfile.TarInfo(name)
      info.size = len(data)
      tar.addfile(info, io.BytesIO(data))
  assert [i.key for i in read("memory://bucket/tars/*.tar")] == ["000000007"]
  fs.pipe("/bucket/own/a.jpg", jpeg(7))
  fs.pipe("/bucket/own/pairs.jsonl", b'{"key": "k", "image": "a.jpg", "caption": "gray"}\n')
  assert prepare(tmp_path, source="memory://bucket/own", heldout_fraction=0.0)["train_pairs"] == 1
  (pair,) = reader.read_pairs(tmp_path, "train")
  np.testing.assert_allclose(reader.load_image(pair.image, 4), 7, atol=1)

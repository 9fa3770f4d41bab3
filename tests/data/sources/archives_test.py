import gzip
import io
import tarfile

import pyarrow as pa
from pyarrow import parquet

from cm3leon_jax.config.data import RawConfig
from cm3leon_jax.data.raw import ingest
from cm3leon_jax.data.sources import archives, formats
from cm3leon_jax.stages.shards import Runner
from tests.data.raw.untrusted_test import reasons
from tests.data.sources.formats_test import jpeg, read, sample, write_tar


def test_what_a_tar_may_hold(tmp_path):
  path = tmp_path / "a.tar"
  with tarfile.open(path, "w") as tar:
    for kind, name in ((tarfile.SYMTYPE, "1.jpg"), (tarfile.CHRTYPE, "2.jpg")):
      info = tarfile.TarInfo(name)
      info.type, info.linkname = kind, "/etc/passwd"
      tar.addfile(info)
    for name, data in (
      *sample(3), *sample(4), ("../5.jpg", jpeg(5)), ("../5.txt", b"gray"), ("/6.txt", b"gray"),
    ):  # fmt: skip
      info = tarfile.TarInfo(name)
      info.size = len(data)
      tar.addfile(info, io.BytesIO(data))
  expected = ["000000003", "000000004", "../5", "missing_image"]  # Skips links and devices.
  assert reasons(formats.read(formats.parts(str(path))[0])) == expected
  config = RawConfig(source=str(path), resolution=4, max_rejected=0.5)
  ingest.prepare(config, ingest.parts_of(config), tmp_path / "raw", Runner())
  # The member "../5" wrote no file.
  assert {x.name for x in tmp_path.iterdir()} == {"a.tar", "raw"}


def test_a_compressed_tar_is_refused(tmp_path):
  write_tar(tmp_path / "b", sample(1))
  (tmp_path / "a.tar").write_bytes(gzip.compress((tmp_path / "b").read_bytes()))
  [item] = read(tmp_path / "a.tar")
  assert item.reason == "unreadable_file"
  assert "it must be a complete, uncompressed tar file." in item.message


def test_the_size_that_a_member_claims_is_not_reserved(tmp_path):
  """A sparse member or a wrong header claims a size of one terabyte; no memory is allocated."""
  info = tarfile.TarInfo("1.jpg")
  info.size = 2**40
  (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(10_240))
  assert reasons(read(tmp_path / "a.tar")) == ["large_file", "unreadable_file"]


def test_rows_of_parquet_are_read_up_to_the_largest_size(tmp_path, monkeypatch):
  """One group claims large values, and in another a dictionary repeats one value."""
  monkeypatch.setattr(archives, "MAX_GROUP", 100_000)
  schema = pa.schema({"text": pa.string(), "vector": pa.binary()})
  with parquet.ParquetWriter(tmp_path / "a.parquet", schema, compression="zstd") as writer:
    for values in (["a"] * 2, ["x" * 200_000, "a"], ["x" * 30_000] * 9, ["a"]):
      rows = {"text": values, "vector": [bytes(99_000)] * len(values)}  # Vectors are not read.
      writer.write_table(pa.table(rows, schema))
  assert (tmp_path / "a.parquet").stat().st_size < 10_000
  found = list(read(tmp_path / "a.parquet"))
  assert reasons(found) == [
    *("a.parquet/0", "a.parquet/1", "large_file"),
    *("a.parquet/4", "a.parquet/5", "large_file", "a.parquet/13"),
  ]
  assert "rows from 2 to 3" in found[2].message

import gzip
import io
import tarfile

import pytest

from cm3leon_jax.data.raw import ingest
from cm3leon_jax.data.raw.config import RawConfig
from cm3leon_jax.data.sources import archives, formats
from cm3leon_jax.files.shards import Runner
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


def test_a_large_member_is_passed_over(tmp_path, monkeypatch):
  monkeypatch.setattr(archives, "MAX_MEMBER", 2_000)
  members = [*sample(1), ("2.jpg", bytes(2_001)), ("2.txt", b"a"), *sample(3)]
  write_tar(tmp_path / "a.tar", members)
  found = list(read(tmp_path / "a.tar"))
  assert reasons(found) == ["000000001", "large_file", "missing_image", "000000003"]
  assert "2.jpg has 2,001 bytes; the maximum is 2,000." in found[1].message


def test_the_size_that_a_member_claims_is_not_reserved(tmp_path):
  """A sparse member or a wrong header claims a size of one terabyte; no memory is allocated."""
  info = tarfile.TarInfo("1.jpg")
  info.size = 2**40
  (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(10_240))
  assert reasons(read(tmp_path / "a.tar")) == ["large_file", "unreadable_file"]


@pytest.mark.parametrize(
  "headers",
  [
    {"GNU.sparse.map": "abc"}, {"GNU.sparse.size": "x"}, {"GNU.sparse.major": "1"},
    {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"},
  ],
)  # fmt: skip
def test_wrong_headers_of_sparse_members_are_rejected(tmp_path, headers):
  with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
    info = tarfile.TarInfo("1.jpg")
    info.pax_headers, info.size = headers, 4
    tar.addfile(info, io.BytesIO(b"abcd"))
  reasons(read(tmp_path / "a.tar"))


def test_a_compressed_tar_is_refused(tmp_path):
  write_tar(tmp_path / "b", sample(1))
  (tmp_path / "a.tar").write_bytes(gzip.compress((tmp_path / "b").read_bytes()))
  [item] = read(tmp_path / "a.tar")
  assert item.reason == "unreadable_file"
  assert "it must be a complete, uncompressed tar file." in item.message

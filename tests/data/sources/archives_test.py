import gzip
import io
import tarfile

from cm3leon_jax.data.raw import ingest
from cm3leon_jax.data.raw.config import RawConfig
from cm3leon_jax.data.sources import formats
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


def test_a_compressed_tar_is_refused(tmp_path):
  write_tar(tmp_path / "b", sample(1))
  (tmp_path / "a.tar").write_bytes(gzip.compress((tmp_path / "b").read_bytes()))
  [item] = read(tmp_path / "a.tar")
  assert item.reason == "unreadable_file"
  assert "it must be a complete, uncompressed tar file." in item.message

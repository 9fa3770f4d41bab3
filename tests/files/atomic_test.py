import errno
import os

import pytest

from cm3leon_jax.files import atomic, digests, json_files


def test_absolute_paths_of_buckets_stay_in_their_bucket(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert str(atomic.absolute("gs://bucket/run")) == "gs://bucket/run"
  assert str(atomic.absolute("run")) == str(tmp_path / "run")


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_a_file_about_which_a_disk_does_not_answer_is_not_absent(tmp_path, monkeypatch, number):
  path, described = tmp_path / "x.json", {"bytes": 2, "sha256": ""}
  path.write_text("{}")

  def stat(name, *args, **options):
    raise OSError(number, "no answer", name)

  reads = (atomic.exists, json_files.read_json, json_files.read_json_lines, digests.digest)
  with monkeypatch.context() as patch:
    patch.setattr(os, "stat", stat)
    for read in (*reads, lambda path: digests.damage(path, described)):
      with pytest.raises(OSError, match="no answer"):
        read(path)
  assert atomic.exists(path)
  for absent in (tmp_path / "y", path / "below a file", tmp_path / ("long" * 999), "null\0byte"):
    assert not atomic.exists(absent)
  assert digests.digest(tmp_path) is None  # A folder has no digest.


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
  path = tmp_path / "deep" / "a.txt"
  with atomic.replacing(path, "w") as file:
    file.write("ä")
    assert not path.exists()
  assert path.read_bytes() == "ä".encode()
  with pytest.raises(TypeError), atomic.replacing(path) as file:
    file.write("text into a binary file")
  assert path.read_text(encoding="utf-8") == "ä"


@pytest.mark.parametrize(("number", "name"), [(errno.ENOSPC, "a.json"), (errno.EIO, None)])
def test_an_error_of_a_full_disk_has_the_file(tmp_path, number, name):
  with pytest.raises(OSError, match="no answer") as error, atomic.replacing(tmp_path / "a.json"):
    raise OSError(number, "no answer")
  assert error.value.filename == (name and str(tmp_path / name))

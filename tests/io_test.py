import errno
import json
import os

import numpy as np
import pytest

from cm3leon_jax import io
from cm3leon_jax.config import UserError
from cm3leon_jax.io import read_json, write_json


def test_write_json_replaces_and_leaves_no_partial_file(tmp_path):
  path = tmp_path / "deep" / "x.json"
  write_json(path, {"a": 1})
  write_json(path, {"a": (np.float32(0.5), "b")})
  assert json.loads(path.read_text()) == {"a": [0.5, "b"]}
  assert [p.name for p in path.parent.iterdir()] == ["x.json"]


def test_absolute_paths_of_buckets_stay_in_their_bucket(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert str(io.absolute("gs://bucket/run")) == "gs://bucket/run"
  assert str(io.absolute("run")) == str(tmp_path / "run")


def test_damaged_or_absent_json_is_refused(tmp_path):
  with pytest.raises(UserError, match="does not exist"):
    read_json(tmp_path / "x.json")
  (tmp_path / "x.json").write_text("{")
  with pytest.raises(UserError, match=r"not valid JSON .*: delete it and run its stage again\.$"):
    read_json(tmp_path / "x.json")
  with pytest.raises(UserError, match=r"not valid JSON .*: get it again from where it was pub"):
    read_json(tmp_path / "x.json", {}, io.GET_AGAIN)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_a_file_about_which_a_disk_does_not_answer_is_not_absent(tmp_path, monkeypatch, number):
  path, described = tmp_path / "x.json", {"bytes": 2, "sha256": ""}
  path.write_text("{}")

  def stat(name, *args, **options):
    raise OSError(number, "no answer", name)

  reads = (io.exists, io.read_json, io.read_json_lines, io.digest)
  with monkeypatch.context() as patch:
    patch.setattr(os, "stat", stat)
    for read in (*reads, lambda path: io.damage(path, described)):
      with pytest.raises(OSError, match="no answer"):
        read(path)
  assert io.exists(path)
  for absent in (tmp_path / "y", path / "below a file", tmp_path / ("long" * 999), "null\0byte"):
    assert not io.exists(absent)
  assert io.digest(tmp_path) is None  # A folder.


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
  path = tmp_path / "deep" / "a.txt"
  with io.replacing(path, "w") as file:
    file.write("ä")
    assert not path.exists()
  assert path.read_bytes() == "ä".encode()
  with pytest.raises(TypeError), io.replacing(path) as file:
    file.write("text into a binary file")
  assert path.read_text(encoding="utf-8") == "ä"


def test_of_a_growing_file_only_the_last_line_may_be_cut(tmp_path):
  path = tmp_path / "log.jsonl"
  assert io.read_json_lines(path) == []
  path.write_text('{"step": 1}\n{"step": 2}\n{"st')
  assert io.read_json_lines(path) == [{"step": 1}, {"step": 2}]
  path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
  with pytest.raises(UserError, match=r"log\.jsonl, line 2 is not valid JSON .* delete this line"):
    io.read_json_lines(path)


def test_digest_literal(tmp_path):
  (tmp_path / "a").write_bytes(b"abc")
  assert io.digest(tmp_path / "a").startswith("ba7816bf8f01cfea")
  assert io.digest(tmp_path / "b") is None


def test_of_a_file_whose_writing_fails_nothing_is_left(tmp_path):
  (tmp_path / "x").write_text("old")
  with pytest.raises(TypeError), io.replacing(tmp_path / "x") as file:
    file.writelines([b"new", "text into a binary file"])
  assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("x", "old")]


def test_json_of_another_program_is_a_regular_file_of_bounded_size(tmp_path):
  path = tmp_path / "x.json"
  path.write_text('{"a": 1}')
  assert io.read_foreign_json(path, {"a": int}) == {"a": 1}
  os.truncate(path, io.FOREIGN_BYTES + 1)
  with pytest.raises(UserError, match="has 67,108,865 bytes; it may have 67,108,864: get it again"):
    io.read_foreign_json(path)
  path.unlink()
  os.mkfifo(path)
  with pytest.raises(UserError, match="is no regular file: get it again"):
    io.read_foreign_json(path)
  with pytest.raises(UserError, match=r"y\.json does not exist"):
    io.read_foreign_json(tmp_path / "y.json")

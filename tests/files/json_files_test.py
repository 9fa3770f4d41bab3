import json
import os

import numpy as np

from cm3leon_jax.errors import UserError
from cm3leon_jax.files import json_files
from cm3leon_jax.files.json_files import read_json, write_json
from tests.refusals import refused


def test_write_json_replaces_and_leaves_no_partial_file(tmp_path):
  path = tmp_path / "deep" / "x.json"
  write_json(path, {"a": 1})
  write_json(path, {"a": (np.float32(0.5), "b")})
  assert json.loads(path.read_text()) == {"a": [0.5, "b"]}
  assert [p.name for p in path.parent.iterdir()] == ["x.json"]


def test_damaged_or_absent_json_is_refused(tmp_path):
  with refused(UserError, "x.json", "json"):
    read_json(tmp_path / "x.json")
  (tmp_path / "x.json").write_text("{")
  with refused(UserError, "x.json", "json"):
    read_json(tmp_path / "x.json")
  with refused(UserError, "x.json", "download"):
    read_json(tmp_path / "x.json", {}, json_files.GET_AGAIN)


def test_of_a_growing_file_only_the_last_line_may_be_cut(tmp_path):
  path = tmp_path / "log.jsonl"
  assert json_files.read_json_lines(path) == []
  path.write_text('{"step": 1}\n{"step": 2}\n{"st')
  assert json_files.read_json_lines(path) == [{"step": 1}, {"step": 2}]
  path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
  with refused(UserError, "log.jsonl", "2"):
    json_files.read_json_lines(path)


def test_json_of_another_program_is_a_regular_file_of_bounded_size(tmp_path):
  path = tmp_path / "x.json"
  path.write_text('{"a": 1}')
  assert json_files.read_foreign_json(path, {"a": int}) == {"a": 1}
  os.truncate(path, json_files.FOREIGN_BYTES + 1)
  with refused(UserError, "x.json", "67,108,865"):
    json_files.read_foreign_json(path)
  path.unlink()
  os.mkfifo(path)
  with refused(UserError, "x.json", "regular"):
    json_files.read_foreign_json(path)
  with refused(UserError, "y.json", "json"):
    json_files.read_foreign_json(tmp_path / "y.json")

import json

import pytest

from benchmarks import golden, golden_data, golden_digests


def write(folder, **files):
  folder.mkdir(exist_ok=True)
  for name, content in files.items():
    path = folder / name.replace("__", ".")
    path.write_text(content if isinstance(content, str) else json.dumps(content))
  return golden_digests.of_folder(folder)


def test_a_changed_number_or_byte_is_named(tmp_path):
  old = write(tmp_path / "old", metrics__json={"loss": 1.0}, weights__bin="abc")
  assert write(tmp_path / "same", metrics__json={"loss": 1.0}, weights__bin="abc") == old
  new = write(tmp_path / "new", metrics__json={"loss": 1.0000001}, weights__bin="abd")
  assert golden.changes(old, new) == ["metrics.json", "weights.bin"]


def test_a_file_of_one_side_alone_is_named(tmp_path):
  old = write(tmp_path / "old", a__bin="a", b__bin="b")
  new = write(tmp_path / "new", a__bin="a", c__bin="b")
  assert golden.changes(old, new) == ["b.bin", "c.bin"]


def test_times_and_texts_for_people_are_left_out(tmp_path):
  old = write(tmp_path / "old", done__json={"seconds": 1, "files": {"a": {"time": 2}}})
  done = {"seconds": 3, "files": {"a": {"time": 4}}}
  new = write(tmp_path / "new", done__json=done, README__md="a card", report__html="a page")
  assert golden.changes(old, new) == []


def test_folders_of_samples_are_compared_without_the_digest_in_their_names(tmp_path):
  for name in ("old/tasks-0dd27e16", "new/tasks-ffffffff"):
    (tmp_path / name).mkdir(parents=True)
    write(tmp_path / name, results__jsonl='{"tokens": [1, 2]}')
  old, new = (golden_digests.of_folder(tmp_path / name) for name in ("old", "new"))
  assert old == new
  assert list(old) == ["tasks/results.jsonl"]


def test_lines_are_compared_in_their_order(tmp_path):
  old = write(tmp_path / "old", log__jsonl='{"a": 1}\n{"a": 2}\n')
  new = write(tmp_path / "new", log__jsonl='{"a": 2}\n{"a": 1}\n')
  assert golden.changes(old, new) == ["log.jsonl"]


def test_the_table_counts_and_names_what_differs():
  old = {"rows": {"row 0": "a", "row 1": "b"}, "opt": {"loss": 1.0}}
  new = {"rows": {"row 0": "a", "row 1": "c"}, "opt": {"loss": 1.0}}
  text, different = golden.table(old, new)
  assert different == 1
  assert text.splitlines()[2:] == ["| rows | 2 | 1: row 1 |", "| opt | 1 | 0 |"]


def test_a_part_is_not_run_twice(tmp_path, monkeypatch):
  ran = []
  monkeypatch.setattr(golden.golden_run, "prepare", lambda place: ran.append("prepare"))
  monkeypatch.setitem(golden.golden_run.PARTS, "opt", lambda place: ran.append("opt") or {"a": 1})
  monkeypatch.setitem(golden.golden_run.PARTS, "rows", lambda place: ran.append("rows") or {})
  kept = tmp_path / "kept.json"
  golden.measure(None, ["opt"], kept)
  assert golden.measure(None, ["opt", "rows"], kept) == {"opt": {"a": 1}, "rows": {}}
  assert ran == ["prepare", "opt", "rows"]


def test_a_part_brings_the_parts_that_it_reads():
  assert golden.golden_run.with_needed(["tasks"]) == ["modern", "tuned", "tasks"]
  assert golden.golden_run.with_needed(["bundled", "opt"]) == ["opt", "bundled"]
  assert golden.golden_run.with_needed(golden.golden_run.PARTS) == list(golden.golden_run.PARTS)


def test_ids_of_tokens_are_compared(tmp_path):
  old = write(tmp_path / "old", tokenizer__json={"added_tokens": [{"id": 1}]})
  new = write(tmp_path / "new", tokenizer__json={"added_tokens": [{"id": 2}]})
  assert golden.changes(old, new) == ["tokenizer.json"]


def test_given_files_are_the_same_at_each_writing(tmp_path):
  for name in ("a", "b"):
    golden_data.write(tmp_path / name / "data")
  first, second = (golden_digests.of_folder(tmp_path / name) for name in ("a", "b"))
  assert first == second
  assert len(first) > len(golden_data.CAPTIONS)
  requests = golden_data.http_requests(tmp_path / "a")
  assert {path for path, *_ in requests} == {
    *("/v1/images/generations", "/v1/chat/completions", "/v1/images/edits")
  }


def test_a_commit_that_does_not_exist_is_named():
  with pytest.raises(SystemExit, match="no-such-commit"):
    golden.git("rev-parse", "--verify", "no-such-commit^{commit}")

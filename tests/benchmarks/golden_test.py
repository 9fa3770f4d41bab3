import json

import pytest

from benchmarks import golden, golden_data, golden_digests


def write(folder, **files):
  folder.mkdir(exist_ok=True)
  for name, content in files.items():
    path = folder / name.replace("__", ".")
    path.write_text(content if isinstance(content, str) else json.dumps(content))
  return golden_digests.of_folder(folder)


DONE = {"seconds": 1, "files": {"a": {"time": 2}}}


@pytest.mark.parametrize(
  ("old", "new", "changes"),
  [
    ({"a__json": {"loss": 1.0}, "b__bin": "b"}, {"a__json": {"loss": 1.0}, "b__bin": "b"}, []),
    ({"a__json": {"loss": 1.0}}, {"a__json": {"loss": 1.0000001}}, ["a.json"]),
    ({"a__bin": "a", "b__bin": "b"}, {"a__bin": "a", "b__bin": "c"}, ["b.bin"]),
    ({"a__bin": "a", "b__bin": "b"}, {"a__bin": "a", "c__bin": "b"}, ["b.bin", "c.bin"]),
    ({"a__jsonl": '{"a": 1}\n{"a": 2}\n'}, {"a__jsonl": '{"a": 2}\n{"a": 1}\n'}, ["a.jsonl"]),
    # The comparison ignores times and texts for people.
    ({"done__json": DONE}, {"done__json": {"seconds": 3, "files": {"a": {"time": 4}}}}, []),
    ({}, {"README__md": "a card", "report__html": "a page"}, []),
  ],
)
def test_files_that_differ_are_named(tmp_path, old, new, changes):
  found = write(tmp_path / "old", **old), write(tmp_path / "new", **new)
  assert golden.changes(*found) == changes


def test_folders_of_samples_are_compared_without_the_digest_in_their_names(tmp_path):
  for name in ("old/tasks-0dd27e16", "new/tasks-ffffffff"):
    (tmp_path / name).mkdir(parents=True)
    write(tmp_path / name, results__jsonl='{"tokens": [1, 2]}')
  old, new = (golden_digests.of_folder(tmp_path / name) for name in ("old", "new"))
  assert old == new
  assert list(old) == ["tasks/results.jsonl"]


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

"""Tests that messages with text from untrusted flags and sources are safe for a terminal."""

import json

from hypothesis import example, given, settings
from hypothesis import strategies as st
import pytest

from cm3leon_jax.data.instructions.task_files import parse_tasks
from cm3leon_jax.errors import UserError
from cm3leon_jax.evaluation.protocols import protocol
from tests.launched import SCENES, launch
from tests.reports.hostile import CONTROLS, HOSTILE

TASKS = """
- name: a
  format: jsonl
  root: r
  templates: ['{a} <break> {b}']
  target: b
  heldout: val
"""
PROTOCOL = (
  "title: t\ntask: image\ndata: {format: heldout}\ncolumns: [{name: a}]\nmetrics: [clip_score]\n"
)
PIECES = [
  "\n", ":", "- ", "{", "}", "[", "]", "&a ", "*a", "'", "1: 2", "? ", "!!python/object:os.system",
  "name", "null", "{prompt!r:{caption}}", "\x1b", "\ud800", "9" * 5_000, "0x", "2026-11-27", ".inf",
  "!!binary YQ==", "!!bool x", "!!timestamp x", "!!int ''", "<<: ", "\t",
  "%YAML 9", "--- ", "[" * 400, "!!set {a, b}", "!!int x",
]  # fmt: skip


READERS = {"tasks": (parse_tasks, TASKS), "protocol": (protocol.parse, PROTOCOL)}


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_any_yaml_is_read_or_one_sentence(name):
  parse_text, right = READERS[name]
  assert parse_text(right, "my.yaml")

  @given(st.lists(st.tuples(st.integers(0, 200), st.sampled_from(PIECES)), max_size=4))
  @example([(0, "1: 2\n")])
  @example([(0, "{1: 2}\n")])
  @example([(0, "[" * 3_000)])
  @example([(0, "!!python/object/apply:os.system [id]\n")])
  @example([(8, "&a [*a]")])
  @settings(max_examples=60, deadline=None)
  def check(changes):
    text = right
    for place, piece in changes:
      text = text[:place] + piece + text[place:]
    try:
      found = parse_text(text, "my.yaml")
    except UserError as error:
      found = str(error)
      assert found.isprintable()
    assert found

  check()


def test_a_command_prints_no_control_character_of_a_source(tmp_path):
  """The command exits with code 2 and prints one line. A file lists the error of each record."""
  source, workdir = tmp_path / "set", tmp_path / "run"
  source.mkdir()
  lines = [
    {"key": f"{HOSTILE} {i}", "image": f"{HOSTILE.replace('/', '')}.png", "caption": HOSTILE}
    for i in range(3)
  ]
  (source / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  run = launch(
    "prepare_data", f"--config={SCENES}", f"--workdir={workdir}", f"--config.raw.source={source}"
  )
  assert run.returncode == 2, run.stderr
  bars, _, message = run.stderr.partition("error: 3 of 3 records are invalid")
  # Checks that progress bars were found; they are excluded because they may move the cursor.
  assert bars
  assert "<script>alert(1)" in message
  controls = set(CONTROLS) - set("[2J]0;title31m")
  assert not controls & set(message + run.stdout)
  rejected = (workdir / "raw" / "rejected.jsonl").read_text(encoding="utf-8")
  assert not controls & set(rejected)

"""Tests the comparison of messages in separate pytest sessions, and the sentences in the file."""

import json
import os
import pathlib
import platform
import re
import subprocess
import sys

import pytest

from cm3leon_jax.config import UserError
from tests import launched, messages
from tests.messages import refused

TESTS = pathlib.Path(__file__).parent
CASES = """
import pytest
from subprocess import CompletedProcess
from tests.messages import check_refused, refused
class Wrong(ValueError):
  path = ("width",)
def refuse(sentence):
  raise Wrong(sentence)
@pytest.mark.parametrize("width", [1, 2])
def test_widths(width):
  with refused(Wrong, path=("width",)) as error:
    refuse(f"width is {width}.")
  assert error.value.path == ("width",)
def test_two(tmp_path):
  with refused(ValueError):
    refuse(f"{tmp_path}/a.json is missing.")
  with refused(ValueError):
    refuse(f"'{tmp_path}' is a folder.")
def test_command(tmp_path):
  check_refused(CompletedProcess([], 2, "", f"error: {tmp_path} is no folder.\\n"))
def test_none():
  pass
"""
STORED = {
  "a_test.py::test_command": ["TMP is no folder."],
  "a_test.py::test_gone": ["This is no test."],
  "a_test.py::test_two": ["TMP/a.json is missing.", "'TMP' is a folder."],
  "a_test.py::test_widths[1]": ["width is 1."],
  "a_test.py::test_widths[2]": ["width is 2."],
  "other_test.py::test_other": ["This file does not run."],
}
LIVING = {key: sentences for key, sentences in STORED.items() if not key.endswith("_gone")}


@pytest.fixture
def session(tmp_path):
  """Runs CASES with given sentences; returns (exit code, output, sentences stored afterwards)."""
  (tmp_path / "tests").mkdir()
  file = tmp_path / "tests/messages.json"

  def run(stored, *flags, cases=CASES):
    (tmp_path / "tests/a_test.py").write_text(cases)
    file.write_text(json.dumps(stored))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.messages", "-c", os.devnull]
    result = subprocess.run(
      [*command, f"--rootdir={tmp_path}", "--import-mode=importlib", "-p", "no:cacheprovider"]
      + [*flags, os.fspath(tmp_path / "tests/a_test.py")],
      cwd=tmp_path, env={**os.environ, "PYTHONPATH": os.fspath(launched.ROOT)},
      capture_output=True, text=True, check=False,
    )  # fmt: skip
    return result.returncode, result.stdout, json.loads(file.read_text())

  return run


def test_the_stored_sentences_pass(session):
  code, text, stored = session(STORED)
  assert code == 0, text
  assert "5 passed" in text
  assert stored == STORED


def test_other_sentences_fail_their_test_and_say_how_to_renew(session):
  one, two = STORED["a_test.py::test_two"]
  wrong = {
    "test_command": (["x"], "messages.json has x and the error says TMP is no folder."),
    "test_none": (["Nothing is refused."], "messages.json has 1 sentences"),
    "test_two": ([two, one], f"messages.json has {two} and the error says {one}"),
    "test_widths[1]": (["width is 1.", "width is 2."], "messages.json has 2 sentences"),
    "test_widths[2]": ([], "messages.json has no sentence 1 and the error says width is 2."),
  }
  stored = {f"a_test.py::{key}": sentences for key, (sentences, _) in wrong.items()}
  code, text, after = session(stored)
  assert code == 1
  assert "5 failed" in text
  assert after == stored
  for key, (_, said) in wrong.items():
    own = text.split(f"_ {key} _")[1].split("\n___")[0]
    words = " ".join(re.sub(r"(?m)^E ", "", own).split())
    assert said in words
    assert "If that is right: pytest --renew-messages tests/a_test.py" in words


@pytest.mark.parametrize("processes", ["0", pytest.param("2", marks=pytest.mark.slow)])
def test_renewing_writes_what_ran_and_forgets_what_is_gone(session, processes):
  old = {key: ["old"] for key in STORED}
  code, text, stored = session(old, "--renew-messages", "-n", processes)
  assert code == 0, text
  assert stored == {**LIVING, "other_test.py::test_other": ["old"]}
  assert list(stored) == sorted(stored)


@pytest.mark.slow
def test_renewing_leaves_tests_that_did_not_run_or_fail(session):
  old = {key: ["old"] for key in STORED}
  code, _, stored = session(old, "--renew-messages", "-k", "two")
  assert code == 0
  assert stored == {
    key: STORED[key] if key.endswith("_two") else ["old"] for key in STORED if key in LIVING
  }
  broken = CASES + "  assert False\n" + "def test_gone():\n  raise AssertionError\n"
  code, _, stored = session({**LIVING, "a_test.py::test_gone": ["old"]}, "--renew-messages",
                            cases=broken)  # fmt: skip
  assert code == 1
  assert stored == {**LIVING, "a_test.py::test_gone": ["old"]}


def test_facts_are_compared_also_while_renewing(session):
  wrong = CASES.replace('refused(Wrong, path=("width",))', 'refused(Wrong, path=("height",))')
  code, text, stored = session({}, "--renew-messages", cases=wrong)
  assert code == 1
  assert "2 failed" in text
  assert list(stored) == ["a_test.py::test_command", "a_test.py::test_two"]


def test_a_fixture_cannot_refuse(session):
  code, text, _ = session({}, "--renew-messages", cases=CASES.replace(
    "def test_none", "@pytest.fixture\ndef early():\n  with refused(ValueError):\n    refuse('x')\n"
    "def test_none").replace("test_none()", "test_none(early)"))  # fmt: skip
  assert code == 1
  assert "in a fixture, use pytest.raises" in text


@pytest.mark.parametrize(
  ("code", "stdout", "stderr"),
  [(1, "", "error: no.\n"), (2, "x", "error: no.\n"), (2, "", "no.\n"), (2, "", "error: a\nb\n")],
)
def test_a_command_is_refused_by_one_sentence_and_code_2(code, stdout, stderr):
  with pytest.raises(AssertionError):
    messages.check_refused(subprocess.CompletedProcess([], code, stdout, stderr))


def test_another_class_is_no_refusal():
  with pytest.raises(KeyError), refused(ValueError):
    raise KeyError("name")


def test_what_a_machine_has_elsewhere_gets_fixed_words(tmp_path_factory, monkeypatch):
  base = tmp_path_factory.getbasetemp()
  home, root = pathlib.Path("/home/she"), TESTS.parent
  monkeypatch.setenv("HOME", str(home))
  monkeypatch.setattr(platform, "node", lambda: "vm-1")
  cases = {
    f"{base}/test_a0/run.json: no.": "TMP/run.json: no.",
    f"'{base}/test_a12', and {base}/data3.": "'TMP', and TMP.",
    f"{root}/docs/a.md, {root}.": "ROOT/docs/a.md, ROOT.",
    f"{root}er/a.md": f"{root}er/a.md",
    f"file://{home}/x": "file://HOME/x",
    f"{home}r and a{home}": f"{home}r and a{home}",
    f"{sys.prefix}/lib": "PYTHON/lib",
    f"process {os.getpid()} on vm-1 works in w.": "process PID on HOST works in w.",
    "process 0 on vm-1, process 7 on vm": "process 0 on HOST, process 7 on vm",
    f"d/{'0a' * 16} is not {'1b' * 6}.": "d/HEX is not HEX.",
    f"width is {2**70}.": f"width is {2**70}.",
  }
  for sentence, expected in cases.items():
    assert messages.same_everywhere(UserError(sentence), base) == expected


def raised(call):
  with pytest.raises(ValueError, match="is no JSON") as error:
    call()
  return error.value


def test_what_a_library_says_is_no_part_of_a_sentence(tmp_path):
  def wrap(make):
    try:
      make()
    except Exception as error:
      raise UserError(f"a.json is no JSON ({error}): delete it.") from error

  def own():
    raise ValueError("a name is absent")

  def absent():
    return {}["format of it"]

  folder, library = pathlib.Path(tmp_path), "a.json is no JSON (CAUSE): delete it."
  for call, sentence in (
    (lambda: json.loads("{"), library),
    (lambda: b"caf\xe9 caf\xe9".decode(), library),
    (lambda: (folder / "none").read_text(), library),
    (own, "a.json is no JSON (a name is absent): delete it."),
    (absent, "a.json is no JSON ('format of it'): delete it."),
  ):
    assert messages.same_everywhere(raised(lambda call=call: wrap(call)), folder) == sentence
  circle = UserError("a.json is no JSON (a fault of its reader).")
  circle.__cause__ = OSError("a fault of its reader")
  circle.__cause__.__context__ = circle
  assert messages.same_everywhere(circle, folder) == "a.json is no JSON (CAUSE)."


def test_each_stored_key_names_a_test():
  stored = json.loads((TESTS / messages.NAME).read_text("utf-8"))
  assert list(stored) == sorted(stored)
  named = {tuple(re.match(r"([^:]+)::(\w+)", key).groups()) for key in stored}
  texts = {file: (TESTS / file).read_text("utf-8") for file, _ in named if (TESTS / file).exists()}
  assert [(f, name) for f, name in named if f"def {name}(" not in texts.get(f, "")] == []

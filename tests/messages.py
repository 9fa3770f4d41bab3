"""Compares error messages with the sentences stored in messages.json; a flag updates the file.

  def test_a_negative_width_is_refused():
    with refused(FieldError, path=("width",)) as error:
      build(Sample, {"width": -1}, "sample")

A test states the class and the attributes of an error, or runs a command (`check_refused`).
tests/messages.json has the messages of each test, in the order in which they occur.
`pytest --renew-messages tests/config_test.py` stores the sentences of the tests that ran, and
removes tests that no longer exist.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import json
import os
import pathlib
import platform
import re
import subprocess
import sys
import traceback
from typing import Any

import pytest

from cm3leon_jax.config import UserError

ROOT = pathlib.Path(__file__).parents[1]
NAME = "messages.json"
HEX = re.compile(r"(?<![\w])(?=\d*[a-f])[0-9a-f]{12,}(?!\w)")
ATTRIBUTE = "messages"  # Key of the messages in the output of an xdist worker.


@dataclasses.dataclass
class _Running:
  """State of the running test: key, stored sentences (None: not compared), and errors so far."""

  key: str
  stored: list[str] | None
  met: list[str] = dataclasses.field(default_factory=list)


_running: _Running | None = None
_base = pathlib.Path()  # Folder for the temporary files of the session.


@pytest.fixture(autouse=True, scope="session")
def _know_base(tmp_path_factory):
  global _base
  _base = tmp_path_factory.getbasetemp()


@contextlib.contextmanager
def refused(kind: type[BaseException], **facts: Any) -> Iterator[pytest.ExceptionInfo]:
  """Expects an error of class `kind`, with attributes `facts` and the stored sentence as message.

  Yields:
    The result of `pytest.raises`; after the block, its `value` is the error.

  Raises:
    AssertionError: an attribute or the sentence differs.
  """
  _require_test()
  with pytest.raises(kind) as error:
    yield error
  found = {name: getattr(error.value, name) for name in facts}
  assert found == facts, f"{error.value!r} has {found}"
  _compare(same_everywhere(error.value, _base))


def check_refused(result: subprocess.CompletedProcess, code: int = 2) -> None:
  """Expects that a command exited with `code` and printed only the stored one-line error."""
  _require_test()
  assert (result.returncode, result.stdout) == (code, ""), result.stderr
  assert re.fullmatch(r"error: .*\n", result.stderr), result.stderr
  _compare(_without_machine(result.stderr.removeprefix("error: ").strip(), _base))


def check_sentence(sentence: str) -> None:
  """Expects that a text, such as a server's response, equals the stored sentence."""
  _require_test()
  _compare(_without_machine(sentence, _base))


def _require_test() -> None:
  if _running is None:
    raise RuntimeError(
      "refused() works only in the body of a test: in a fixture, use pytest.raises."
    )


def _compare(sentence: str) -> None:
  """Adds a sentence to the running test's; raises AssertionError if the stored one differs."""
  _running.met.append(sentence)
  if _running.stored is None:
    return
  place = len(_running.met) - 1
  if place >= len(_running.stored):
    raise AssertionError(_different(_running.key, f"has no sentence {place + 1}", sentence))
  if sentence != (known := _running.stored[place]):
    raise AssertionError(_different(_running.key, f"has\n  {known}", sentence))


def _different(key: str, stored: str, met: str) -> str:
  file = key.partition("::")[0]
  return (
    f"of this test, {NAME} {stored}\nand the error says\n  {met}\n"
    f"If that is right: pytest --renew-messages tests/{file}"
  )


def same_everywhere(error: BaseException, base: pathlib.Path) -> str:
  """Returns the message of an error, with placeholders for what differs between machines.

  The placeholders are TMP for the folder of a test in `base`, ROOT for the repository, PYTHON for
  the Python environment, HOME for the home folder, HEX for digests, PID and HOST for this process
  and machine, and CAUSE for the message of a library.

  Args:
    error: an error that this repository raised.
    base: folder of the session's temporary files.
  """
  sentence = str(error)
  for said in _said_by_libraries(error):
    if len(said := str(UserError(said)).strip()) > 8:  # As UserError quotes it.
      sentence = sentence.replace(said, "CAUSE")
  return _without_machine(sentence, base)


def _without_machine(sentence: str, base: pathlib.Path) -> str:
  sentence = re.sub(rf"{re.escape(os.fspath(base))}/[\w-]+", "TMP", sentence)
  folders = [(os.fspath(ROOT), "ROOT"), (sys.prefix, "PYTHON"), (sys.base_prefix, "PYTHON")]
  folders += [(os.fspath(pathlib.Path.home()), "HOME")]
  for folder, word in sorted(folders, key=lambda pair: -len(pair[0])):
    if folder != "/":
      sentence = re.sub(rf"(?<![\w.-]){re.escape(folder)}(?![\w-])", word, sentence)
  host = re.escape(platform.node())
  sentence = re.sub(rf"process {os.getpid()} on {host}\b", "process PID on HOST", sentence)
  sentence = re.sub(rf" on {host}\b", " on HOST", sentence)
  return HEX.sub("HEX", sentence)


def _said_by_libraries(error: BaseException) -> Iterator[str]:
  """Yields the messages of those causes of an error that other packages raised.

  Omits KeyErrors: their text is the key, which does not depend on a package's version.
  """
  seen = {id(error)}
  while (error := error.__cause__ or error.__context__) and id(error) not in seen:
    seen.add(id(error))
    *_, last = [None, *traceback.extract_tb(error.__traceback__)]
    folders = pathlib.Path(last.filename).parents if last else ()
    own = ROOT in folders and pathlib.Path(sys.prefix) not in folders
    if not (own and last.line.startswith("raise ")) and not isinstance(error, KeyError):
      first = next(iter(f"{error}".strip().splitlines()), "")
      yield from (repr(error), str(error), " ".join(str(error).split()), first)
      yield first.partition(" [")[0]


def _key(item: pytest.Item) -> str:
  """Returns a test's key in messages.json: its path relative to tests/, without the xdist group."""
  return re.sub(r"@[^]@]*$", "", item.nodeid).removeprefix("tests/")


class Keeper:
  """Provides each test with its stored sentences; --renew-messages stores the new sentences."""

  def __init__(self, config: pytest.Config):
    self._config, self._renew = config, config.getoption("renew_messages")
    self._file = config.rootpath / "tests" / NAME
    self._stored = json.loads(self._file.read_text("utf-8")) if self._file.exists() else {}
    self._met: dict[str, list[str]] = {}  # Key of a finished test -> its sentences.
    self._gone: set[str] = set()  # Keys of tests that no longer exist.

  @pytest.hookimpl(tryfirst=True)  # Runs before other plugins deselect tests.
  def pytest_collection_modifyitems(self, config, items):
    if any("::" in name for name in config.args) or config.getoption("lf", False):
      return  # Not all tests of a file are collected, so missing keys prove nothing.
    keys = {_key(item) for item in items}
    files = {key.partition("::")[0] for key in keys}
    self._gone = {k for k in self._stored if k.partition("::")[0] in files and k not in keys}

  @pytest.hookimpl(wrapper=True)
  def pytest_runtest_call(self, item):
    global _running
    key = _key(item)
    stored = self._stored.get(key, [])
    _running = running = _Running(key, None if self._renew else stored)
    try:
      result = yield
    finally:
      _running = None
    self._met[key] = running.met
    if not self._renew and len(running.met) < len(stored):
      count = f"has {len(stored)} sentences"
      raise AssertionError(_different(key, count, f"met {len(running.met)}"))
    return result

  @pytest.hookimpl(optionalhook=True)
  def pytest_testnodedown(self, node):
    met, gone = getattr(node, "workeroutput", {}).get(ATTRIBUTE, ({}, []))
    self._met |= met
    self._gone |= set(gone)

  @pytest.hookimpl(tryfirst=True)
  def pytest_sessionfinish(self):
    if not self._renew:
      return
    if hasattr(self._config, "workeroutput"):
      self._config.workeroutput[ATTRIBUTE] = self._met, sorted(self._gone)
      return
    kept = {k: v for k, v in self._stored.items() if k not in self._gone}
    renewed = {k: v for k, v in sorted((kept | self._met).items()) if v}
    text = json.dumps(renewed, indent=1, ensure_ascii=False)
    self._file.write_text(f"{text}\n", "utf-8")


def pytest_addoption(parser):
  text = f"store the sentences of errors in tests/{NAME}, of the tests that run and pass"
  parser.addoption("--renew-messages", action="store_true", help=text)


def pytest_configure(config):
  config.pluginmanager.register(Keeper(config), "messages-keeper")

import sys

import pytest

from cm3leon_jax.commands import config_file
from cm3leon_jax.config import own_functions
from cm3leon_jax.errors import UserError
from tests.refusals import refused


def test_a_function_is_imported_from_its_file_once_per_command(tmp_path):
  file = tmp_path / "own.py"
  file.write_text("def five(x): return x + 5\n")
  assert own_functions.load(f"{file}:five", "raw.source")(1) == 6
  with refused(UserError, "config.raw.source", "six", "own.py"):
    own_functions.load(f"{file}:six", "raw.source")
  with refused(UserError, "config.raw.source", "no.py"):
    own_functions.load(f"{tmp_path}/no.py:five", "raw.source")


def test_a_file_in_a_package_imports_its_neighbors(tmp_path, monkeypatch):
  package = tmp_path / "own_package" / "inner"
  package.mkdir(parents=True)
  for folder in (package.parent, package):
    (folder / "__init__.py").touch()
  (package / "numbers.py").write_text("FIVE = 5\n")
  (package / "own.py").write_text("from own_package.inner import numbers\nget = lambda: numbers\n")
  monkeypatch.setattr(sys, "path", [*sys.path])
  found = own_functions.load(f"{package}/own.py:get", "raw.source")()
  assert found.FIVE == 5
  assert found.__name__ == "own_package.inner.numbers"


@pytest.mark.parametrize(
  ("value", "expected"),
  [("own.py:f", True), ("a/own.py:f", True), ("own.py", False), ("own.py:1", False), ("s", False)],
)
def test_a_name_of_a_function_has_a_file_and_a_name(value, expected):
  assert own_functions.is_function(value) is expected


def test_files_are_relative_to_the_config_that_names_them(tmp_path):
  (tmp_path / "config.py").write_text(
    "from cm3leon_jax.configs import defaults\n"
    "def get_config():\n"
    "  config = defaults.get_config()\n"
    "  config.raw.source = 'own.py:records'\n"
    "  config.reinforce.reward = '/elsewhere/own.py:score'\n"
    "  return config\n"
  )
  config = config_file.load(str(tmp_path / "config.py"))
  assert config.raw.source == f"{tmp_path}/own.py:records"
  assert config.reinforce.reward == "/elsewhere/own.py:score"


@pytest.mark.parametrize(
  ("text", "facts"),
  [
    ("def get_config():\n  return {\n", ["wrong.py, line 2", "never closed"]),
    ("import re\nimport nothing_here\n", ["wrong.py, line 2", "nothing_here"]),
    ("x = 1\n", ["wrong.py", "has no function get_config"]),
    ("def get_config():\n  return {}\n", ["wrong.py", "get_config returns no ml_collections"]),
  ],
)
def test_a_file_that_is_no_config_is_refused_with_its_file_and_line(tmp_path, text, facts):
  (tmp_path / "wrong.py").write_text(text)
  with refused(UserError, *facts):
    config_file.load(str(tmp_path / "wrong.py"))

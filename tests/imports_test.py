"""Imports between the packages point one way; docs/design.md has the same table."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "cm3leon_jax"
BASE = {"vocab", "mesh", "config", "distributed", "stages", "shards", "io", "xla_options"}
CORE = {"tokenizers", "data", "clip", "retrieval", "models", "training", "decoding", "generation"}
# Package -> packages and modules of cm3leon_jax that it may import, beside itself.
MAY_IMPORT = {
  "tokenizers": BASE | {"data"},
  "data": BASE | {"tokenizers"},
  "clip": BASE | {"tokenizers", "data"},
  "retrieval": BASE | {"tokenizers", "data", "clip"},
  "models": {"mesh", "config"},
  "training": BASE | {"models", "data"},
  "decoding": {"models", "mesh", "vocab", "config", "xla_options"},
  "generation": BASE | {"decoding", "retrieval", "clip", "tokenizers", "data"},
  "evaluation": BASE | CORE | {"settings"},
  "reports": BASE | CORE | {"settings", "evaluation"},
  "export": BASE | CORE | {"settings"},
  "planning": BASE | CORE | {"settings"},
}


def imported(source: str) -> set[str]:
  """Packages and modules right below cm3leon_jax that a file imports anywhere.

  >>> imported("from cm3leon_jax.data import plan\\nfrom cm3leon_jax import stages")
  {'data', 'stages'}
  """
  names = []
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      names += [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, "imports are absolute"
      names += [f"{node.module}.{alias.name}" for alias in node.names]
  return {name.split(".")[1] for name in names if name.startswith("cm3leon_jax.")}


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_package_imports_only_what_the_table_allows(package):
  files = sorted((PACKAGE / package).rglob("*.py"))
  assert files
  for file in files:
    surplus = imported(file.read_text()) - MAY_IMPORT[package] - {package}
    assert not surplus, f"{file.relative_to(PACKAGE)} imports {', '.join(sorted(surplus))}"


def test_all_forms_of_imports_are_found():
  source = """
import cm3leon_jax.mesh
from cm3leon_jax import stages
def f():
  from cm3leon_jax.commands.common import run
"""
  assert imported(source) == {"mesh", "stages", "commands"}

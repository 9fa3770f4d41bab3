"""Tests module names, import cycles, and the sizes of folders, files and functions.

`lint-imports` in pyproject.toml defines which package may import which.
"""

import ast
import graphlib
import pathlib
import re

import grimp
import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "cm3leon_jax"


def test_the_package_names_no_example():
  """What it does with scenes, it could do with any functions of a user."""
  found = {
    str(path.relative_to(PACKAGE))
    for path in PACKAGE.rglob("*.py")
    if re.search(r"^\s*(from|import) examples\b", path.read_text(), re.MULTILINE)
  }
  assert found == set()


MODULES = {
  ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
  for path in PACKAGE.rglob("*.py")
}


def in_order(graph: grimp.ImportGraph) -> list[str]:
  """Returns all modules, each after those it imports. Raises CycleError if imports form a cycle."""
  imports = {name: graph.find_modules_directly_imported_by(name) for name in graph.modules}
  for names in imports.values():
    names.discard("cm3leon_jax")  # Imported only to read its version.
  return list(graphlib.TopologicalSorter(imports).static_order())


def test_no_modules_import_each_other_in_a_circle():
  graph = grimp.build_graph("cm3leon_jax", cache_dir=None)
  assert len(in_order(graph)) == len(graph.modules) > 300
  graph.add_import(importer="cm3leon_jax.mesh", imported="cm3leon_jax.models.transformer")
  with pytest.raises(graphlib.CycleError):
    in_order(graph)


def lazily(path: pathlib.Path) -> set[str]:
  """Returns the names of this package that a file imports in `epy.lazy_imports()`."""
  blocks = [x for x in ast.walk(ast.parse(path.read_text())) if isinstance(x, ast.With)]
  imports = [
    statement
    for block in blocks
    if "lazy_imports" in ast.unparse(block.items[0])
    for statement in block.body
    if isinstance(statement, ast.ImportFrom) and statement.module.startswith("cm3leon_jax")
  ]
  return {f"{one.module}.{alias.name}" for one in imports for alias in one.names}


def test_only_modules_are_imported_lazily():
  """A class or function would fail at its first use."""
  names = set().union(*map(lazily, MODULES.values()))
  assert len(names) > 50
  assert names - MODULES.keys() == set()


def test_a_folder_has_at_most_15_files_of_its_own():
  """Exempts the folder `commands`, which has one file per command."""
  folders = {path.parent for path in MODULES.values()} - {PACKAGE / "commands"}
  sizes = {
    str(f.relative_to(PACKAGE)): len({*f.glob("*.py")} - {f / "__init__.py"}) for f in folders
  }
  assert {name: size for name, size in sizes.items() if size > 15} == {}


FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def test_a_file_has_at_most_380_lines_here_and_400_elsewhere_and_a_function_60():
  long = {}
  others = [*PACKAGE.parent.glob("benchmarks/**/*.py"), *PACKAGE.parent.glob("examples/*/*.py")]
  for path in [*MODULES.values(), *others]:
    source = path.read_text(encoding="utf-8")
    if (lines := len(source.splitlines())) > (380 if path in MODULES.values() else 400):
      long[path.name] = lines
    for node in ast.walk(ast.parse(source)):
      if isinstance(node, FUNCTIONS) and (lines := node.end_lineno - node.lineno + 1) > 60:
        long[f"{path.name} {node.name}"] = lines
  assert long == {}

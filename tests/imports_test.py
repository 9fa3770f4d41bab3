"""Which package imports which (the table of docs/design.md), no circles, short folders."""

import ast
import builtins
import collections
import graphlib
import importlib.metadata
import itertools
import pathlib
import re
import sys
import tomllib

import pytest

from cm3leon_jax import worlds

PACKAGE = pathlib.Path(__file__).parents[1] / "cm3leon_jax"
BASE = {
  "vocab", "positions", "mesh", "config", "settings", "files", "runs", "parameters", "distributed",
  "extras", "xla_options", "worlds",
}  # fmt: skip
CORE = {
  "tokenizers", "data", "clip", "retrieval", "models", "weights", "training", "decoding",
  "generation", "trained", "checkpoints",
}  # fmt: skip
# Package -> packages and modules of cm3leon_jax that it may import, beside itself.
MAY_IMPORT = {
  "files": {"config", "extras"},
  "runs": {"config", "settings", "files"},
  "tokenizers": BASE,
  "data": BASE | {"tokenizers"},
  "clip": BASE | {"data"},
  "retrieval": BASE | {"tokenizers", "data", "clip"},
  "models": {"mesh", "config", "parameters"},
  "weights": BASE | {"models"},
  "checkpoints": BASE | {"models", "weights"},
  "training": BASE | {"models", "weights", "checkpoints", "data", "tokenizers", "clip"},
  "decoding": {"models", "mesh", "vocab", "config", "settings", "xla_options", "positions"},
  "trained": BASE | {"tokenizers", "data", "clip", "retrieval", "models", "weights", "checkpoints"},
  "generation": BASE | {"decoding", "retrieval", "clip", "tokenizers", "data", "trained"},
  "evaluation": BASE | CORE,
  "scenes": BASE | CORE | {"evaluation"},
  "reinforcement": BASE | CORE | {"evaluation"},
  "reports": BASE | CORE | {"evaluation"},
  "export": BASE | CORE,
  "importing": BASE | CORE | {"export"},
  "planning": BASE | CORE,
  "serving": BASE | CORE,
}


SETTINGS = {"config", "vocab", "mesh", "files"}  # What settings.py may import beside sections.
SECTION = re.compile(r"cm3leon_jax\.(?:\w+\.)+config\b")  # A module of sections, in a package.


def names_imported(source: str) -> list[str]:
  """Modules that a file imports anywhere, and names of modules.

  >>> names_imported("import os\\nfrom cm3leon_jax.data.rows import plan")
  ['os', 'cm3leon_jax.data.rows.plan']
  """
  names = []
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      names += [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, "imports are absolute"
      names += [f"{node.module}.{alias.name}" for alias in node.names]
  return names


def imported(source: str, sections: bool = True) -> set[str]:
  """Packages and modules right below cm3leon_jax that a file imports anywhere.

  >>> imported("from cm3leon_jax.data.rows import plan\\nfrom cm3leon_jax.runs import stages")
  {'data', 'runs'}

  Args:
    source: text of the file.
    sections: False leaves out the modules of sections of the config.
  """
  names = [name for name in names_imported(source) if name.startswith("cm3leon_jax.")]
  return {name.split(".")[1] for name in names if sections or not SECTION.match(name)}


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_package_imports_only_what_the_table_allows(package):
  files = sorted((PACKAGE / package).rglob("*.py"))
  assert files
  for file in files:
    name = str(file.relative_to(PACKAGE))
    allowed = MAY_IMPORT[package] | {package}
    surplus = imported(file.read_text(), sections="settings" not in allowed) - allowed
    assert not surplus, f"{name} imports {', '.join(sorted(surplus))}"


def test_a_section_of_the_config_imports_nothing_of_its_room():
  files = sorted(PACKAGE.glob("*/**/config.py"))
  assert {"clip", "models", "training"} <= {file.parent.name for file in files}
  for file in files:
    surplus = imported(file.read_text()) - {"config", "vocab", "worlds"}
    assert not surplus, f"{file.relative_to(PACKAGE)} imports {', '.join(sorted(surplus))}"


def names_a_world(source: str) -> bool:
  """Whether a file imports a module of a world, or names one: its folder is that of the module.

  >>> names_a_world("from cm3leon_jax.scenes.judge import judge")
  True
  """
  folders = {module.split(".")[1] for module in worlds.MODULES.values()}
  return bool(re.search(rf"cm3leon_jax(\.| import )({'|'.join(folders)})\b", source))


def test_only_the_table_of_worlds_and_the_settings_name_a_world():
  """The settings import the section of the config."""
  rooms = {module.split(".")[1] for module in worlds.MODULES.values()} | {"configs"}
  found = {
    str(path.relative_to(PACKAGE))
    for path in PACKAGE.rglob("*.py")
    if path.relative_to(PACKAGE).parts[0] not in rooms and names_a_world(path.read_text())
  }
  assert found == {"worlds.py", "settings.py"}
  source = (PACKAGE / "settings.py").read_text()
  assert not names_a_world(SECTION.sub("", source))


@pytest.mark.parametrize(
  ("source", "expected"),
  [
    ("import cm3leon_jax.scenes.world", True),
    ("from cm3leon_jax import scenes", True),
    ("def f():\n  from cm3leon_jax.scenes import leaks", True),
    ('importlib.import_module("cm3leon_jax.scenes.interface")', True),
    ("from cm3leon_jax.data.sources import drawn\nname = 'scenes'", False),
  ],
)
def test_names_of_worlds_are_found(source, expected):
  assert names_a_world(source) == expected


def test_the_settings_import_only_the_base_and_sections():
  source = (PACKAGE / "settings.py").read_text()
  assert imported(source, sections=False) <= SETTINGS


def test_the_table_lets_no_packages_import_each_other_in_a_circle():
  graphlib.TopologicalSorter(MAY_IMPORT).prepare()


def test_only_commands_import_the_trainers_of_the_small_models():
  names = re.compile(r"training\.small(\.| import )(vqgan|clip)_training")
  files = [path for path in PACKAGE.rglob("*.py") if names.search(path.read_text())]
  assert {path.parent.name for path in files} == {"commands"}


def test_the_page_on_design_has_the_same_table():
  page = (PACKAGE.parent / "docs" / "design.md").read_text()
  rooms = page.partition("## Rooms")[2].partition("\n## ")[0]
  base = re.search(r"The base is (.*?)\.\n", rooms, re.DOTALL)[1]
  assert set(re.findall(r"`(\w+)`", base)) == BASE
  found = {}
  for folder, allowed in re.findall(r"^\| `(\w+)/` \|.*\| (.*) \|$", rooms, re.MULTILINE):
    names = set(re.findall(r"`(\w+)`", allowed))
    names |= BASE if "base" in allowed.split(", ") else set()
    found[folder] = names | (CORE if "all above" in allowed else set())
  assert {folder: found[folder] for folder in MAY_IMPORT} == MAY_IMPORT
  folders = {path.parent.name for path in PACKAGE.glob("*/*.py")}
  assert set(found) == folders


def test_all_forms_of_imports_are_found():
  source = """
import cm3leon_jax.mesh
from cm3leon_jax.runs import stages
def f():
  from cm3leon_jax.commands.common import run
"""
  assert imported(source) == {"mesh", "runs", "commands"}
  source = """
from cm3leon_jax.clip.config import CLIPConfig
from cm3leon_jax.data.rows import config
from cm3leon_jax.config import UserError
from cm3leon_jax.commands.config_file import read
from cm3leon_jax.data.configs import plan
"""
  assert imported(source) == {"clip", "data", "config", "commands"}
  assert imported(source, sections=False) == {"data", "config", "commands"}


MODULES = {
  ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
  for path in PACKAGE.rglob("*.py")
}


def imported_modules(source: str, modules) -> set[str]:
  """Modules of the package that a file imports anywhere, also where only types need them."""
  found = set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      names = {f"{node.module}.{alias.name}" for alias in node.names}
      found |= {name if name in modules else node.module for name in names}
  return found & set(modules)


def test_no_modules_import_each_other_in_a_circle():
  graph = {
    name: imported_modules(path.read_text(), MODULES) - {"cm3leon_jax"}
    for name, path in MODULES.items()
  }
  assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(MODULES)


def test_a_circle_is_found():
  modules = ("a", "b.c")
  graph = {
    "a": imported_modules("def f():\n  from b import c", modules),
    "b.c": imported_modules("import a", modules),
  }
  assert graph == {"a": {"b.c"}, "b.c": {"a"}}
  with pytest.raises(graphlib.CycleError):
    graphlib.TopologicalSorter(graph).prepare()


def test_a_folder_has_at_most_15_files_of_its_own():
  """But `commands`, a list of one file each."""
  folders = {path.parent for path in MODULES.values()} - {PACKAGE / "commands"}
  sizes = {
    str(f.relative_to(PACKAGE)): len({*f.glob("*.py")} - {f / "__init__.py"}) for f in folders
  }
  assert {name: size for name, size in sizes.items() if size > 15} == {}


FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def test_a_file_has_at_most_400_lines_and_a_function_60():
  long = {}
  others = [*PACKAGE.parent.glob("benchmarks/*.py"), *PACKAGE.parent.glob("examples/*/*.py")]
  for path in [*MODULES.values(), *others]:
    source = path.read_text(encoding="utf-8")
    if (lines := len(source.splitlines())) > 400:
      long[path.name] = lines
    for node in ast.walk(ast.parse(source)):
      if isinstance(node, FUNCTIONS) and (lines := node.end_lineno - node.lineno + 1) > 60:
        long[f"{path.name} {node.name}"] = lines
  assert long == {}


def test_no_two_public_classes_have_one_name():
  places = collections.defaultdict(list)
  for name, path in MODULES.items():
    for node in ast.parse(path.read_text()).body:
      if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
        places[node.name].append(name)
  assert {name: found for name, found in places.items() if len(found) > 1} == {}


def libraries() -> set[str]:
  """Names by which the dependencies of the project are imported."""
  project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
  extras = project["optional-dependencies"].values()
  needed = [*project["dependencies"], *itertools.chain(*extras)]
  needed = {re.split(r"[^\w.-]", name)[0].lower().replace("_", "-") for name in needed}
  found = importlib.metadata.packages_distributions().items()
  return {
    name
    for name, distributions in found
    if needed & {d.lower().replace("_", "-") for d in distributions}
  }


def test_no_module_has_the_name_of_a_library_or_builtin():
  taken = libraries() | set(sys.stdlib_module_names) | set(dir(builtins))
  assert {"jax", "orbax", "io", "compile"} <= taken
  assert [path for path in MODULES.values() if path.stem in taken] == []

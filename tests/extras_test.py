from importlib import metadata
import pathlib
import re
import tomllib

import pytest

from cm3leon_jax import extras

ROOT = pathlib.Path(__file__).parents[1]
REQUIRES = [
  "jax>=0.10",
  'starlette<2,>=1.0; extra == "serve"',
  'uvicorn; extra == "serve"',
  'ray[data]>=2.51; extra == "ray"',
  "libtpu>=0.0.52; (sys_platform == 'linux' and platform_machine == 'x86_64') and extra == 'aot'",
]


@pytest.mark.parametrize(
  ("extra", "command"),
  [
    ("serve", "pip install 'starlette<2,>=1.0' uvicorn"),
    ("ray", "pip install 'ray[data]>=2.51'"),
    ("aot", "pip install 'libtpu>=0.0.52'"),
  ],
)
def test_packages_of_an_extra_are_quoted_for_a_shell(extra, command, monkeypatch):
  monkeypatch.setattr(metadata, "requires", lambda name: REQUIRES)
  assert extras.install(extra) == command


def test_a_checkout_without_metadata_installs_itself(monkeypatch):
  def absent(name):
    raise metadata.PackageNotFoundError(name)

  monkeypatch.setattr(metadata, "requires", absent)
  assert extras.install("serve") == "pip install -e '.[serve]'"


def test_the_metadata_names_every_package_of_an_extra():
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  for extra, requirements in project["optional-dependencies"].items():
    found = extras.install(extra)
    for requirement in requirements:
      assert re.match(r"[\w.-]+", requirement)[0] in found


USES = re.compile(r"extras\.install\(['\"](\w+)['\"]\)")
ON_AN_INDEX = re.compile(r"pip install (?:-\S+ )*['\"]?cm3leon_jax(?![\w.*-]*\.whl)")
OF_A_CHECKOUT = re.compile(r"pip install -e")
# Files that may explain how to install from a checkout.
CHECKOUT = ("docs/installation.md", "cm3leon_jax/extras.py")


def texts():
  patterns = ("cm3leon_jax/**/*.py", "cm3leon_jax/**/*.jinja", "cm3leon_jax/**/*.md")
  patterns += ("benchmarks/*/*.py", "tools/*.py", "docs/*.md", "*.md", "docs/*.ipynb")
  return {p.relative_to(ROOT).as_posix(): p.read_text() for x in patterns for p in ROOT.glob(x)}


def test_nothing_installs_the_package_from_an_index_or_a_checkout_that_is_not_there():
  found = texts()
  assert len(found) > 250
  assert not [name for name, text in found.items() if ON_AN_INDEX.search(text)]
  wrong = {name for name, text in found.items() if OF_A_CHECKOUT.search(text)} - set(CHECKOUT)
  assert wrong <= {"CONTRIBUTING.md", "CHANGELOG.md"}


def test_messages_ask_for_extras_that_there_are():
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  used = {extra for text in texts().values() for extra in USES.findall(text)}
  assert {"data", "serve", "monitoring", "ray", "eval", "demo", "aot"} <= used
  assert used <= set(project["optional-dependencies"])

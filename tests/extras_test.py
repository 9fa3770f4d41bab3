import pathlib
import re
import tomllib

ROOT = pathlib.Path(__file__).parents[1]


def canonical(requirement):
  """Returns the name and the sorted version bounds of a requirement."""
  name, bounds = re.fullmatch(r"([\w.\[\]-]+)(.*)", requirement).groups()
  return name, tuple(sorted(bounds.split(",")))


def test_pages_and_docstrings_name_the_versions_of_the_extras():
  extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
  known = {r.partition(";")[0].strip() for requirements in extra.values() for r in requirements}
  shown = set()
  for name, text in texts().items():
    if not name.endswith("served_example.py"):
      for line in re.findall(r"pip install (.*)", text):
        shown |= set(re.findall(r"'([\w.\[\]-]+[<>=][^' ]+)'", line))
  assert {"uvicorn>=0.40", "ray[data]>=2.51", "libtpu>=0.0.52,<0.0.53"} <= shown
  assert {canonical(r) for r in shown} <= {canonical(r) for r in known}


USES = re.compile(r"extras\.install\(['\"](\w+)['\"]\)")


def texts():
  patterns = ("cm3leon_jax/**/*.py", "cm3leon_jax/**/*.jinja", "cm3leon_jax/**/*.md")
  patterns += ("benchmarks/*.py", "docs/*.md", "*.md", "docs/*.ipynb")
  return {p.relative_to(ROOT).as_posix(): p.read_text() for x in patterns for p in ROOT.glob(x)}


def test_messages_ask_for_extras_that_there_are():
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  used = {extra for text in texts().values() for extra in USES.findall(text)}
  assert {"data", "serve", "monitoring", "ray", "eval", "demo", "aot"} <= used
  assert used <= set(project["optional-dependencies"])

import pathlib
import re
import tomllib

ROOT = pathlib.Path(__file__).parents[1]


USES = re.compile(r"extras\.install\(['\"](\w+)['\"]\)")


def texts():
  patterns = ("cm3leon_jax/**/*.py", "cm3leon_jax/**/*.jinja", "cm3leon_jax/**/*.md")
  patterns += ("benchmarks/*/*.py", "tools/*.py", "docs/*.md", "*.md", "docs/*.ipynb")
  return {p.relative_to(ROOT).as_posix(): p.read_text() for x in patterns for p in ROOT.glob(x)}


def test_messages_ask_for_extras_that_there_are():
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  used = {extra for text in texts().values() for extra in USES.findall(text)}
  assert {"data", "serve", "monitoring", "ray", "eval", "demo", "aot"} <= used
  assert used <= set(project["optional-dependencies"])

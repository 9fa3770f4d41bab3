"""Tests that the documentation builds and mentions only names that exist; tests metadata files."""

import collections
import dataclasses
import itertools
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest
import yaml

from cm3leon_jax.commands import COMMANDS
from cm3leon_jax.config.settings import SECTIONS
from tools import config_page, tasks_page

ROOT = pathlib.Path(__file__).parents[1]
GENERATED = {"config": config_page.page, "instruction_tasks": tasks_page.page}
# docs/log.md names what an earlier commit has.
PAGES = sorted(p for p in (ROOT / "docs").glob("*.md") if p.stem not in {"log", *GENERATED})
PAGES += [ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]
FIELDS = {f"{name}.{f.name}" for name, cls in SECTIONS.items() for f in dataclasses.fields(cls)}
FIELDS |= {f"{name}.FIELD" for name in SECTIONS} | {f"config.{name}" for name in SECTIONS}
SUFFIXES = ["py", "json", "jsonl", "npy", "npz", "png", "sh", "md"]
SUFFIXES += ["txt", "csv", "sha256", "safetensors"]
SOURCES = {
  path.with_suffix("") if path.suffix == ".jinja" else path: path.read_text()
  for folder in ("cm3leon_jax", "benchmarks", "tools", "examples", "launch", ".ci", "tests")
  for path in (ROOT / folder).rglob("*.*")
  if path.suffix in (".py", ".sh", ".sbatch", ".yaml", ".service", ".jinja")
}
EXAMPLES = {"path/own.py", "my_tuning.py"}  # Example names of a user's files.


def flags_in(*files: str) -> set[str]:
  """Returns the names of the flags that `files` define; paths are relative to the root."""
  pattern = r"(?:DEFINE_\w+|add_argument)\(\s*\"(?:--)?(\w+)\""
  found = {flag for file in files for flag in re.findall(pattern, SOURCES[ROOT / file])}
  of_commands = [SOURCES[ROOT / file] for file in files if "/commands/" in file]
  found |= {flag for text in of_commands for flag in re.findall(r'\n  (\w+): .*\n  """', text)}
  return found | {"help", *(field.name for field in dataclasses.fields(SECTIONS["sampling"]))}


def unknown_names(text: str) -> list[str]:
  """Returns the commands, flags, config fields, files and members in `text` that do not exist."""
  unknown = []
  text = text.replace("\\\n", " ").replace("\n$G", "\ncm3leon generate")
  text = text.replace("python -m launch.pod", "").replace("python -m launch.", "cm3leon ")
  names = re.findall(r"\blaunch\.([a-z_]+)(?![a-z_]*/)|\bcm3leon[ \n]([a-z_]+)", text)
  unknown += [f"command {a or b}" for a, b in names if (a or b) not in COMMANDS]
  common = [f"cm3leon_jax/commands/{name}.py" for name in ("command_line", "shared_flags")]
  for module, rest in re.findall(
    r"\b(cm3leon [a-z_]+|(?<=python -m )(?:benchmarks|tools)\.[\w.]+)([^`\n]*)", text
  ):
    if module.startswith("cm3leon "):
      file = f"cm3leon_jax/commands/{module.removeprefix('cm3leon ')}.py"
    else:
      file = f"{module.replace('.', '/')}.py"
      if (ROOT / file).with_suffix("").is_dir():
        file = f"{module.replace('.', '/')}/__main__.py"
    if ROOT / file not in SOURCES:
      unknown += [module] if not module.startswith("cm3leon ") else []
      continue
    drawing = ["cm3leon_jax/commands/drawing.py"] * ("drawing.Flags" in SOURCES[ROOT / file])
    taken = flags_in(file, *common, *drawing)
    unknown += [f"{module} --{f}" for f in re.findall(r" --(\w+)", rest) if f not in taken]
  scripts = "".join(SOURCES[p] for p in SOURCES if p.is_relative_to(ROOT / "launch"))
  python = flags_in(*(str(p.relative_to(ROOT)) for p in SOURCES if p.suffix == ".py"))
  defined = python | set(re.findall(r"--(\w+)", scripts)) | {"ray_address"}
  unknown += [f"--{f}" for f in re.findall(r"`--(\w+)(?![\w-])", text) if f not in defined]
  fields = re.findall(r"--config\.([a-z_]+\.\w+)", text)
  unknown += [f"--config.{field}" for field in fields if field not in FIELDS]
  inline = re.findall(r"`([^`\n]+)`", text)
  for path in {p for span in inline for p in re.findall(r"^[\w./@-]+\.(?:py|sh|sbatch)$", span)}:
    if path not in EXAMPLES and not any(str(p).endswith(f"/{path}") for p in SOURCES):
      unknown.append(path)
  modules = [p for p in SOURCES if p.is_relative_to(ROOT / "cm3leon_jax") and p.suffix == ".py"]
  # Name of a module -> source text; modules of several folders may share a name.
  stems = collections.defaultdict(str)
  for path in modules:
    stems[path.stem] += SOURCES[path]
  package = "".join(stems.values())
  for module, name in itertools.chain(*(re.findall(r"^(\w+)\.(\w+)$", s) for s in inline)):
    exists = f"{module}.{name}" in FIELDS or re.search(rf"\b{name}\b", stems.get(module, name))
    # `module` may be a variable instead of a module.
    exists = exists or re.search(rf"\bdef {name}\b", package)
    if name not in SUFFIXES and not exists:
      unknown.append(f"{module}.{name}")
  return unknown


def test_the_site_builds_without_warnings_and_renders_every_table_and_list(tmp_path):
  site = tmp_path / "site"
  result = subprocess.run(
    [sys.executable, "-m", "mkdocs", "build", "--strict", f"--site-dir={site}"],
    cwd=ROOT, capture_output=True, text=True, check=False,
  )  # fmt: skip
  assert result.returncode == 0, result.stderr
  assert 'not included in the "nav"' not in result.stderr
  for page in (ROOT / "docs").glob("*.md"):
    html = site / ("index.html" if page.stem == "index" else f"{page.stem}/index.html")
    paragraphs = re.findall(r"<p>(.*?)</p>", html.read_text(), re.DOTALL)
    # A table or a list without an empty line before it renders as a paragraph.
    assert not [p[:200] for p in paragraphs if re.search(r"^(\| |- |\d\. )", p, re.MULTILINE)], page


@pytest.mark.parametrize("name", GENERATED)
def test_the_generated_pages_are_current(name):
  page = (ROOT / "docs" / f"{name}.md").read_text()
  assert page == GENERATED[name](), f"run: python -m tools.{name.split('_')[-1]}_page > {page}"


def anchors(page: pathlib.Path) -> set[str]:
  """Returns the anchors of the headings of a page, as GitHub makes them."""
  text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
  titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
  return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_relative_links_lead_to_files_and_headings():
  listed = subprocess.check_output(["git", "ls-files", "*.md"], cwd=ROOT, text=True).split()
  dead = []
  for name in listed:
    page = ROOT / name
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r'\]\(([^)\s]+)\)|(?:src|href)="([^"]+)"', text):
      path, _, anchor = "".join(link).partition("#")
      target = (page.parent / path) if path else page
      if ":" in path or (target.exists() and (not anchor or anchor in anchors(target))):
        continue
      dead.append(f"{name}: {''.join(link)}")
  assert not dead


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_names_exists(page):
  assert not unknown_names(page.read_text())
  prose = re.sub(r"^```.*?^```|^\|.*?$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
  assert not [line for line in prose.split("\n") if len(line) > 130]


def test_names_that_do_not_exist_are_found():
  wrong = """`launch.draw` `cm3leon fly` `--no_such_flag` `data/nothing.py` `stages.NOTHING`
`train.no_field` --config.train.no_field=1
cm3leon train --config=c --prompt=x
python -m benchmarks.nothing"""
  assert unknown_names(wrong) == [
    "command draw", "command fly", "cm3leon train --prompt", "benchmarks.nothing",
    "--no_such_flag", "--config.train.no_field", "data/nothing.py", "stages.NOTHING",
    "train.no_field",
  ]  # fmt: skip


def test_the_citation_names_the_version():
  citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  of_code = project["license"].split(" AND ")[0]
  assert (citation["version"], citation["license"]) == (project["version"], of_code)

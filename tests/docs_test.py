"""Tests that the documentation builds as a site, and files about the project."""

import pathlib
import re
import subprocess
import sys
import tomllib

import yaml

ROOT = pathlib.Path(__file__).parents[1]


def test_the_site_builds_without_warnings_and_renders_every_table_and_list(tmp_path):
  site = tmp_path / "site"
  result = subprocess.run(
    [sys.executable, "-m", "mkdocs", "build", "--strict", f"--site-dir={site}"],
    cwd=ROOT, capture_output=True, text=True, check=False,
  )  # fmt: skip
  assert result.returncode == 0, result.stderr
  for page in (ROOT / "docs").glob("*.md"):
    html = site / ("index.html" if page.stem == "index" else f"{page.stem}/index.html")
    paragraphs = re.findall(r"<p>(.*?)</p>", html.read_text(), re.DOTALL)
    # Python-Markdown needs an empty line before a table or a list.
    assert not [p[:200] for p in paragraphs if re.search(r"^(\| |- |\d\. )", p, re.MULTILINE)], page


def test_every_page_is_in_the_navigation():
  text = (ROOT / "mkdocs.yml").read_text()
  assert not [page.name for page in (ROOT / "docs").glob("*.md") if f": {page.name}\n" not in text]


def test_the_citation_names_the_version():
  citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  assert (citation["version"], citation["license"]) == (project["version"], project["license"])


def test_workflows_run_what_the_repository_has():
  workflows = {
    path.stem: yaml.safe_load(path.read_text()) for path in ROOT.glob(".github/workflows/*")
  }
  commands = {
    name: [step["run"] for job in flow["jobs"].values() for step in job["steps"] if "run" in step]
    for name, flow in workflows.items()
  }
  assert commands["test"] == ["bash .ci/run"]
  assert commands["docs"][-1] == "mkdocs build --strict"

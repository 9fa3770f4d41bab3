"""Hook of mkdocs: adds README.md as the home page."""

import pathlib
import re

from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).parents[1]


def home() -> str:
  """Returns README.md with links relative to docs/; links to files outside docs/ become text."""
  text = (ROOT / "README.md").read_text(encoding="utf-8")
  text = re.sub(r'(\]\(|src=")docs/', r"\1", text)
  outside = r"\[([^\]]+)\]\((?:CHANGELOG|CONTRIBUTING|CITATION|cm3leon_jax)[^)]*\)"
  return re.sub(outside, r"\1", text)


def on_files(files, config):
  """Returns the files of the site with index.md."""
  files.append(File.generated(config, "index.md", content=home()))
  return files

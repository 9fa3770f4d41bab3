"""Hook of mkdocs: makes README.md the home page of the site."""

import pathlib
import re

from mkdocs.structure.files import File

README = pathlib.Path(__file__).parents[1] / "README.md"


def on_files(files, config):
  """Adds index.md: README.md, whose links to docs/ are relative; links to other files are text."""
  text = re.sub(r'(\]\(|src=")docs/', r"\1", README.read_text(encoding="utf-8"))
  text = re.sub(r"\[([^\]]+)\]\((?:CHANGELOG|CONTRIBUTING|CITATION|cm3leon_jax)[^)]*\)", r"\1", text)
  files.append(File.generated(config, "index.md", content=text))
  return files

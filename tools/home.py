"""Hook of mkdocs: makes README.md the home page of the site."""

import pathlib
import re

from mkdocs.structure.files import File

README = pathlib.Path(__file__).parents[1] / "README.md"


def on_files(files, config):
  """Adds index.md: README.md with links relative to docs/; links to other files become text."""
  text = re.sub(r'(\]\(|src=")docs/', r"\1", README.read_text(encoding="utf-8"))
  outside = r"\[([^\]]+)\]\((?:CHANGELOG|CONTRIBUTING|CITATION|cm3leon_jax)[^)]*\)"
  text = re.sub(outside, r"\1", text)
  files.append(File.generated(config, "index.md", content=text))
  return files

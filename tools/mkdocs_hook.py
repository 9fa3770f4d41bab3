"""Hook of mkdocs: adds the pages that are generated, and README.md as the home page."""

import pathlib
import re
import sys

from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).parents[1]


def home() -> str:
  """Returns README.md with links relative to docs/; links to files outside docs/ become text."""
  text = (ROOT / "README.md").read_text(encoding="utf-8")
  text = re.sub(r'(\]\(|src=")docs/', r"\1", text)
  outside = r"\[([^\]]+)\]\((?:CHANGELOG|CONTRIBUTING|CITATION|cm3leon_jax)[^)]*\)"
  return re.sub(outside, r"\1", text)


def on_files(files, config):
  """Returns the files of the site with index.md, config.md and instruction_tasks.md."""
  sys.path.insert(0, str(ROOT))
  from tools import config_page, tasks_page

  pages = {"index.md": home, "config.md": config_page.page, "instruction_tasks.md": tasks_page.page}
  for name, page in pages.items():
    files.append(File.generated(config, name, content=page()))
  return files

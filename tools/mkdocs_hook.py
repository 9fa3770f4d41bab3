"""Hook of mkdocs: adds the pages that are generated, which are not stored."""

import pathlib
import sys

from mkdocs.structure.files import File


def on_files(files, config):
  """Returns the files of the site with config.md and instruction_tasks.md."""
  sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
  from tools import config_page, tasks_page

  for name, text in (
    ("config.md", config_page.page()),
    ("instruction_tasks.md", tasks_page.page()),
  ):
    files.append(File.generated(config, name, content=text))
  return files

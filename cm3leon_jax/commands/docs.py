"""Prints a page of the documentation as Markdown; without a page, lists the pages.

cm3leon docs
cm3leon docs own_images
"""

import pathlib
import re
import textwrap

import cm3leon_jax
from cm3leon_jax.commands import common

FOLDER = pathlib.Path(cm3leon_jax.__file__).parent / "docs"
PAGES = sorted(path.stem for path in FOLDER.glob("*.md"))


def first_sentence(page: str) -> str:
  """Returns the first sentence of a page: first_sentence("# A\\nB [c](c.md). D.") = "B c."."""
  prose = re.sub(r"(?s)```.*?```", "", page)
  prose = re.sub(r"(?m)^[#|].*$", "", prose)
  prose = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", prose)
  return textwrap.shorten(re.split(r"(?<=[.:])\s", prose.strip(), maxsplit=1)[0], 100)


def main(name: str) -> None:
  if name:
    print((FOLDER / f"{name}.md").read_text(encoding="utf-8"), end="")
    return
  width = max(map(len, PAGES), default=0)
  for page in PAGES:
    print(f"{page:{width}}  {first_sentence((FOLDER / f'{page}.md').read_text(encoding='utf-8'))}")


if __name__ == "__main__":
  common.run(main, workdir=False, config=False, actions=("", *PAGES))

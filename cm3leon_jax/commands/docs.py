"""Prints a page of the documentation as Markdown; without a page, lists the pages.

cm3leon docs
cm3leon docs own_images
cm3leon docs config train.patience
"""

import pathlib
import re
import sys
import textwrap

import cm3leon_jax
from cm3leon_jax.commands import common
from cm3leon_jax.errors import UserError, did_you_mean

FOLDER = pathlib.Path(cm3leon_jax.__file__).parent / "docs"
PAGES = sorted(path.stem for path in FOLDER.glob("*.md"))


def text_of(page: str) -> str:
  return (FOLDER / f"{page}.md").read_text(encoding="utf-8")


def first_sentence(page: str) -> str:
  """Returns the first sentence of a page: first_sentence("# A\\nB [c](c.md). D.") = "B c."."""
  prose = re.sub(r"(?s)```.*?```", "", page)
  prose = re.sub(r"(?m)^[#|].*$", "", prose)
  prose = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", prose)
  return textwrap.shorten(re.split(r"(?<=[.:])\s", prose.strip(), maxsplit=1)[0], 100)


def about(field: str) -> str:
  """Returns what config.md says about a field, or about each field of a section.

  about("train.steps") = "train.steps = 41723 (int, > 0): Number of training steps."
  """
  known, section = {}, ""
  for line in text_of("config").splitlines():
    section = f"{line[3:]}." if line.startswith("## ") else section
    if row := re.fullmatch(r"\| `(\w+)` \| (.*) \| (.*) \| (.*) \|", line):
      name, values, default, meaning = row.groups()
      known[section + name] = f"{section}{name} = {default.strip('`')} ({values}): {meaning}"
  lines = [line for name, line in known.items() if f"{name}.".startswith(f"{field}.")]
  if not lines:
    hint = did_you_mean(field, known, "`cm3leon docs config` lists them.")
    raise UserError(f"the config has no field '{field}': {hint}")
  return "\n".join(lines)


def main(name: str) -> None:
  page, _, field = name.partition(" ")
  if field:
    print(about(field.removeprefix("config.")))
  elif page:
    print(text_of(page), end="")
  else:
    width = max(map(len, PAGES), default=0)
    for page in PAGES:
      print(f"{page:{width}}  {first_sentence(text_of(page))}")


if __name__ == "__main__":
  actions = ["", *PAGES]
  if sys.argv[1:2] == ["config"] and not "".join(sys.argv[2:3]).startswith("-"):
    actions.append(" ".join(sys.argv[1:3]))
    sys.argv[1:3] = actions[-1:]
  common.run(main, workdir=False, config=False, actions=actions)

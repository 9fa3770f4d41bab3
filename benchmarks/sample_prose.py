"""Draws random pieces of the project's prose, which a reader then judges.

  python -m benchmarks.sample_prose --seed=7

Prints docstrings, comments, messages and paragraphs of the pages, each with its place. Choose the
seed only after the prose is written. The reader marks each piece that needs a second reading.
"""

import ast
from collections.abc import Iterator
import io
import pathlib
import random
import re
import subprocess
import tokenize

from absl import app, flags

ROOT = pathlib.Path(__file__).parents[1]
GENERATED = ("docs/config.md", "docs/cards/", "CHANGELOG.md")
WORDS = 5  # Shorter pieces are names or lists of letters.


def of_python(path: pathlib.Path) -> Iterator[tuple[int, str]]:
  """Yields (line, text) of docstrings, comments and messages of a file."""
  source = path.read_text(encoding="utf-8")
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
      if isinstance(node.value.value, str):
        yield node.lineno, node.value.value
    elif (
      isinstance(node, ast.Call) and getattr(node.func, "id", "").endswith("Error") and node.args
    ):
      yield node.lineno, ast.unparse(node.args[0])
  block: list[str] = []
  for token in tokenize.generate_tokens(io.StringIO(source).readline):
    if token.type == tokenize.COMMENT:
      block.append(token.string.lstrip("# "))
    elif token.type != tokenize.NL and block:
      yield token.start[0], " ".join(block)
      block = []


def of_page(path: pathlib.Path) -> Iterator[tuple[int, str]]:
  """Yields (line, text) of paragraphs, list items and table rows of a page, without code blocks."""
  line, in_code = 1, False
  for paragraph in re.split(r"(\n\s*\n|\n(?=[-|] ))", path.read_text(encoding="utf-8")):
    in_code ^= paragraph.count("```") % 2 == 1
    if paragraph.strip() and not in_code and "```" not in paragraph:
      yield line, paragraph
    line += paragraph.count("\n")


def pieces() -> list[tuple[str, str]]:
  """Returns (place, text) of all pieces of prose in tracked files."""
  found = []
  tracked = subprocess.run(
    ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
  )
  for name in tracked.stdout.split():
    if name.startswith(GENERATED) or not name.endswith((".py", ".md")):
      continue
    read = of_python if name.endswith(".py") else of_page
    found += [(f"{name}:{line}", text.strip()) for line, text in read(ROOT / name)]
  return [(place, text) for place, text in found if len(text.split()) >= WORDS]


def main(_) -> None:
  chosen = random.Random(flags.FLAGS.seed).sample(pieces(), flags.FLAGS.count)
  for number, (place, text) in enumerate(chosen, 1):
    print(f"[{number}] {place}\n{text}\n")


if __name__ == "__main__":  # Flags defined here do not exist in tests that import it.
  flags.DEFINE_integer("seed", None, "Seed of the draw.", required=True)
  flags.DEFINE_integer("count", 40, "Number of pieces.", lower_bound=1)
  app.run(main)

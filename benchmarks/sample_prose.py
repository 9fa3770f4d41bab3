"""Prints random pieces of the project's prose, so that a reader can judge them.

  python -m benchmarks.sample_prose --seed=7

A piece is a docstring, a comment, a message, or a paragraph or table row of a page. It is printed
with its place and with the line of code or the table header that it belongs to. Choose the seed
only after the prose is written. The reader marks each piece that he has to read twice.
"""

import ast
from collections.abc import Iterator
import io
import pathlib
import random
import re
import subprocess
import tokenize
from typing import NamedTuple

from absl import app, flags

ROOT = pathlib.Path(__file__).parents[1]
GENERATED = ("docs/config.md", "docs/instruction_tasks.md", "docs/cards/", "CHANGELOG.md")
WORDS = 5  # Shorter pieces are names or lists of letters.


class Piece(NamedTuple):
  """Piece of prose, and the line of code or the table header that it belongs to."""

  place: str
  text: str
  context: str = ""


def of_python(name: str) -> Iterator[Piece]:
  """Yields the docstrings, comments and messages of a Python file."""
  source = (ROOT / name).read_text(encoding="utf-8")
  lines = source.splitlines()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
      if isinstance(node.value.value, str):
        context = lines[node.lineno - 2] if node.lineno > 1 else ""
        yield Piece(f"{name}:{node.lineno}", node.value.value, context)
    elif (
      isinstance(node, ast.Call) and getattr(node.func, "id", "").endswith("Error") and node.args
    ):
      yield Piece(f"{name}:{node.lineno}", ast.unparse(node.args[0]))
  block: list[str] = []
  for token in tokenize.generate_tokens(io.StringIO(source).readline):
    if token.type == tokenize.COMMENT:
      block.append(token.string.lstrip("# "))
    elif token.type != tokenize.NL and block:
      yield Piece(f"{name}:{token.start[0]}", " ".join(block), token.line)
      block = []


def of_page(name: str) -> Iterator[Piece]:
  """Yields the paragraphs, list items and table rows of a page, without code blocks."""
  line, in_code, header = 1, False, ""
  page = (ROOT / name).read_text(encoding="utf-8")
  for paragraph in re.split(r"(\n\s*\n|\n(?=[-|] )|\n(?=\|-))", page):
    in_code ^= paragraph.count("```") % 2 == 1
    is_row = paragraph.startswith("|")
    if not is_row and paragraph.strip():
      header = ""
    elif is_row and not header:
      header = paragraph
    elif is_row and not paragraph.startswith("|-"):
      yield Piece(f"{name}:{line}", paragraph, header)
    if not is_row and not in_code and "```" not in paragraph:
      yield Piece(f"{name}:{line}", paragraph)
    line += paragraph.count("\n")


def pieces() -> list[Piece]:
  """Returns all pieces of prose in files that git tracks."""
  found: list[Piece] = []
  tracked = subprocess.run(
    ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
  )
  for name in tracked.stdout.split():
    if not name.startswith(GENERATED) and name.endswith((".py", ".md")):
      found += of_python(name) if name.endswith(".py") else of_page(name)
  return [piece for piece in found if len(piece.text.split()) >= WORDS]


def main(_) -> None:
  chosen = random.Random(flags.FLAGS.seed).sample(pieces(), flags.FLAGS.count)
  for number, piece in enumerate(chosen, 1):
    print(f"[{number}] {piece.place}\n{piece.text.strip()}")
    print(f"  at: {piece.context.strip()}\n" if piece.context else "")


if __name__ == "__main__":  # Tests that import this module need no flags.
  flags.DEFINE_integer("seed", None, "Seed of the draw.", required=True)
  flags.DEFINE_integer("count", 40, "Number of pieces.", lower_bound=1)
  app.run(main)

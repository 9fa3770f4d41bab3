"""Finds and runs the snippets of a Markdown page, as its reader does."""

import re
import subprocess


def snippets(card: str) -> list[tuple[str, str]]:
  """Returns language and text of the snippets in Python and for a shell."""
  return re.findall(r"^```(python|bash)\n(.*?)^```$", card, re.MULTILINE | re.DOTALL)


def execute(found: list[tuple[str, str]]) -> dict:
  """Runs snippets in their order as a reader does; returns the names of those in Python."""
  names: dict = {}
  for language, text in found:
    if language == "bash":
      subprocess.run(["bash", "-e", "-c", text], check=True, capture_output=True)
    else:
      exec(compile(text, "README.md", "exec"), names)
  return names

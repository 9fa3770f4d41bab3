"""Finds and runs the snippets of a Markdown page, as its reader does."""

import re
import subprocess


def snippets(card: str) -> list[tuple[str, str]]:
  """Returns (language, text) of the Python and shell snippets."""
  return re.findall(r"^```(python|bash)\n(.*?)^```$", card, re.MULTILINE | re.DOTALL)


def execute(found: list[tuple[str, str]]) -> dict:
  """Runs snippets in order; returns the names that the Python snippets define."""
  names: dict = {}
  for language, text in found:
    if language == "bash":
      subprocess.run(["bash", "-e", "-c", text], check=True, capture_output=True)
    else:
      exec(compile(text, "README.md", "exec"), names)
  return names

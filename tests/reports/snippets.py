"""Finds and runs the code snippets of a Markdown page, as its readers would."""

import re
import subprocess


def snippets(card: str) -> list[tuple[str, str]]:
  """Returns (language, text) of each Python or shell snippet."""
  return re.findall(r"^```(python|bash)\n(.*?)^```$", card, re.MULTILINE | re.DOTALL)


def execute(found: list[tuple[str, str]]) -> dict:
  """Runs snippets in order; returns the variables that Python snippets define."""
  names: dict = {}
  for language, text in found:
    if language == "bash":
      subprocess.run(["bash", "-e", "-c", text], check=True, capture_output=True)
    else:
      exec(compile(text, "README.md", "exec"), names)
  return names

"""Writes the page of a first run: the machine, the outcome of each part, and the last lines."""

from typing import Any

SHOWN = 8  # Last lines of a part that passed.
OF_FAILURES = 40


def page(results: dict[str, Any]) -> str:
  """Returns the page in Markdown."""
  machine, parts = results["machine"], results["parts"]
  rehearsal = " (a rehearsal on the CPU, with small sizes)" if machine["platform"] == "cpu" else ""
  lines = [f"# First run on {machine['devices']}{rehearsal}", ""]
  lines += [f"- {name}: {value}" for name, value in machine.items()]
  lines += ["", "| part | outcome | seconds | question |", "|---|---|---|---|"]
  lines += [
    f"| {name} | {part['outcome']} | {part['seconds']:.0f} | {part['question']} |"
    for name, part in parts.items()
  ]
  for name, part in parts.items():
    shown = SHOWN if part["outcome"] == "passed" else OF_FAILURES
    text = [line for line in part["lines"] if line][-shown:]
    lines += ["", f"## {name}", f"`{part['command']}`", "", "```", *text, "```"]
    lines += ["", "![four pictures](weights.png)"] * (name == "weights")
  return "\n".join(lines) + "\n"

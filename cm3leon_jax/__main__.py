"""Runs `cm3leon COMMAND FLAGS`, or `python -m cm3leon_jax COMMAND FLAGS`."""

import ast
import pathlib
import runpy
import sys

import cm3leon_jax
from cm3leon_jax.commands import COMMANDS, interrupts
from cm3leon_jax.errors import did_you_mean

# Names that users try -> what does the job.
INSTEAD = {"finetune": "use `cm3leon run --config=own`, or CM3Leon.finetune in Python."}
FOLDER = pathlib.Path(__file__).parent / "commands"


def overview() -> str:
  """Returns the usage text and the summary line of each command, without importing commands."""
  width = max(map(len, COMMANDS))
  lines = ["usage: cm3leon COMMAND --config=NAME_OR_FILE --workdir=FOLDER [FLAGS]", ""]
  for name in COMMANDS:
    docstring = ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text())) or ""
    lines.append(f"  {name:{width}}  {docstring.splitlines()[0]}")
  return "\n".join([*lines, "", "Flags and examples of a command: cm3leon COMMAND --help"])


def start(name: str) -> None:
  """Runs a command with the flags in `sys.argv`, like `python -m cm3leon_jax.commands.NAME`."""
  sys.argv[0] = f"cm3leon {name}"
  interrupts.listen()
  try:
    runpy.run_module(f"cm3leon_jax.commands.{name}", run_name="__main__", alter_sys=True)
  except KeyboardInterrupt:  # While modules are imported.
    interrupts.end()


def main() -> None:
  """Runs the command that `sys.argv[1]` names."""
  name, *flags = sys.argv[1:] or ["--help"]
  if name == "help" and flags:
    name, flags = flags[0], ["--help"]
  if name in ("--help", "-h", "help"):
    print(overview())
  elif name == "--version":
    print(cm3leon_jax.__version__)
  elif name in COMMANDS:
    sys.argv = ["cm3leon", *flags]
    start(name)
  else:
    hint = INSTEAD.get(name) or did_you_mean(name, COMMANDS, "cm3leon --help lists them.")
    print(f"error: there is no command '{name}': {hint}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
  main()

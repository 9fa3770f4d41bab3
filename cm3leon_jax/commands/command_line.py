"""Defines and parses the flags of a command, prints --help, and names a mistake in one sentence."""

from collections.abc import Sequence
import os
import re
import sys
from typing import NoReturn

from absl import flags
import ml_collections
from ml_collections import config_flags

from cm3leon_jax.commands import config_file, flag, shared_flags
from cm3leon_jax.errors import UserError, did_you_mean, printable

FOLDERS = ("workdir", "out", "output", "bundle")  # Flags that name a folder.


class _Parser(flags.ArgumentParser):
  """Parses --config for `config_flags`, which adds the flags --config.SECTION.FIELD."""

  def parse(self, argument: str) -> ml_collections.ConfigDict:
    config = config_file.load(argument)
    given = (re.match(r"--?config\.([\w.]+)", word) for word in sys.argv[1:])
    for name in filter(None, given):
      config_file.check_field(config, name[1])
    return config.lock()  # Locked: flags cannot add fields.

  def flag_type(self) -> str:
    return "config"


def define(cls: type | None, workdir: bool, config: bool) -> None:
  """Defines the flags of the dataclass `cls`, and --workdir and --config if they are true."""
  if cls is not None:
    flag.define(cls)
  if workdir:
    flag.define(shared_flags.Workdir)
  if config:
    config_flags.DEFINE_config_file(
      "config",
      None,
      f"Config: a Python file, e.g. path/own.py, or one of {', '.join(config_file.SHIPPED)}. A "
      "variant follows a colon: own:15. --config.SECTION.FIELD=VALUE, given after --config, "
      "sets a field, e.g. --config.train.steps=100.",
    )
    flags.FLAGS["config"].parser = _Parser()
    flag.define(shared_flags.PrintConfig)


def fail(message: str, code: int = UserError.exit_code) -> NoReturn:
  """Prints one line on stderr and exits."""
  print(f"error: {' '.join(printable(message).split())}", file=sys.stderr)
  sys.exit(code)


def with_homes(arguments: Sequence[str]) -> list[str]:
  """Replaces `~` at the start of paths, because shells leave `--workdir=~/run` as it is.

  with_homes(["--workdir=~/run", "--prompt=~"]) = ["--workdir=/home/ada/run", "--prompt=~"]
  """
  result = [re.fullmatch(r"(--?(?!prompt=)[\w.]+=)(~.*)", one, re.DOTALL) for one in arguments]
  return [m[1] + os.path.expanduser(m[2]) if m else one for m, one in zip(result, arguments)]


def _help() -> str:
  """Returns the docstring of the command, with examples, and its flags."""
  modules = flags.FLAGS.flags_by_module_dict()
  own = [name for name in modules if name == sys.argv[0] or name.startswith("cm3leon_jax.")]
  parts = [sys.modules["__main__"].__doc__ or "", *map(flags.FLAGS.module_help, own)]
  return "\n".join(part.strip("\n") for part in parts)


def _mistake(error: Exception) -> str:
  """Returns what is wrong with a flag, from the error of its parser."""
  name = getattr(error, "flagname", "")
  if name.startswith("config.") and "config" in flags.FLAGS:
    own = name.rpartition(".")[2]
    instead = f"; or give --{own}, which needs no config" if own in flags.FLAGS else ""
    return f"--{name} has no config to change: give --config first{instead}"
  text = re.sub(r"invalid literal for int\(\).*", "it must be a whole number", str(error.args[0]))
  return re.sub(r"could not convert string to float.*", "it must be a number", text)


def parse(actions: Sequence[str], argv: Sequence[str]) -> list[str]:
  """Parses the flags, prints --help, and reports errors in one sentence.

  `actions` has the allowed values of the first argument; without them, no argument is allowed. If
  "" is one of them, the argument is optional.
  """
  if {"--help", "-h"}.intersection(argv):
    print(_help())
    sys.exit(0)
  try:
    program, *words = flags.FLAGS(with_homes(argv))
  # For a wrong field of the config, ml_collections raises AttributeError or KeyError.
  except (flags.Error, ValueError, AttributeError, KeyError) as error:
    if isinstance(error.__context__, UserError):  # absl adds the flag, which may not be the cause.
      fail(str(error.__context__))
    fail(f"{_mistake(error)} (--help lists the flags)")
  words = words or [""] * ("" in actions)
  if actions and (not words or words[0] not in actions):
    hint = did_you_mean("".join(words[:1]), actions, "give one of them.")
    fail(f"the first argument must be one of {', '.join(filter(None, actions))}: {hint}")
  if surplus := words[1:] if actions else words:
    fail(f"unexpected argument '{surplus[0]}': give --name=value, and quotes around spaces.")
  for name in FOLDERS:
    value = flags.FLAGS[name].value if name in flags.FLAGS else None
    if value and "://" not in value and os.path.isfile(value):
      fail(f"--{name} is {value}, which is a file: name a folder.")
  return [program, *words]

"""Checks the command line before the config and JAX are imported, which takes seconds."""

from collections.abc import Iterable
import difflib
import os
import pathlib
import re

from absl import flags

import cm3leon_jax
from cm3leon_jax.commands import config_file
from cm3leon_jax.config import UserError

MODELS = pathlib.Path(cm3leon_jax.__file__).parent / "assets" / "models"  # The installed bundles.


def with_homes(arguments: list[str]) -> list[str]:
  """Replaces `~` at the start of paths, because shells leave `--workdir=~/run` as it is.

  with_homes(["--workdir=~/run", "--prompt=~"]) = ["--workdir=/home/ada/run", "--prompt=~"]
  """
  found = [re.fullmatch(r"(--?(?!prompt=)[\w.]+=)(~.*)", one, re.DOTALL) for one in arguments]
  return [m[1] + os.path.expanduser(m[2]) if m else one for m, one in zip(found, arguments)]


def split(arguments: list[str]) -> tuple[list[str], list[str]]:
  """Separates the flags of the config from the other arguments.

  split(["--config", "scenes", "--workdir=w", "--config.train.steps=9"])
  (["--config", "scenes", "--config.train.steps=9"], ["--workdir=w"])
  """
  config, others, remaining = [], [], list(arguments)
  while remaining:
    argument = remaining.pop(0)
    match = re.fullmatch(r"--?(?:no)?config(?:\.[^=]*)?(=.*)?", argument, re.DOTALL)
    if not match:
      others.append(argument)
      continue
    config.append(argument)
    if match[1] is None and remaining and not remaining[0].startswith("--"):
      config.append(remaining.pop(0))
  return config, others


def given_fields(arguments: Iterable[str]) -> list[str]:
  """Returns the fields that flags --config.SECTION.FIELD set: ["train.steps", ...]."""
  found = [re.match(r"--?(?:no)?config\.([\w.]+)", argument) for argument in arguments]
  return [match[1] for match in found if match]


def check_fields(config: Iterable[str]) -> None:
  """Raises UserError if a flag --config.SECTION.FIELD names an unknown field."""
  for argument in config:
    for field in given_fields([argument]):
      if field not in config_file.field_names():
        raise UserError(config_file.unknown_field(config_file.field_names(), [argument]))


def check_words(words: list[str], actions: tuple[str, ...], arguments: list[str]) -> None:
  """Checks the arguments that are not flags.

  The first word must be one of `actions`; () allows only flags. `arguments` is the whole command
  line, to suggest quotes around a value with spaces.

  Raises:
    UserError: the action is missing or unknown, or another word is given.
  """
  if actions and (not words or words[0] not in actions):
    given = f", not '{words[0]}'" if words else ""
    raise UserError(f"the first argument must say what to do: {', '.join(actions)}{given}.")
  if surplus := words[1:] if actions else words:
    only = "only flags after it" if actions else "flags only"
    raise UserError(
      f"unexpected argument '{surplus[0]}': commands take {only} (--name=value)"
      f"{_quoted(surplus[0], arguments)}."
    )


def _quoted(word: str, arguments: list[str]) -> str:
  """Returns a hint to quote a value with spaces, if the word follows a flag that takes text.

  _quoted("red", ["--prompt=a", "red", "bell"]) = '; a value with spaces needs quotes: --prompt="a
  red bell"'
  """
  place = arguments.index(word)
  before = [i for i in range(place) if arguments[i].startswith("-")]
  if not before:
    return ""
  name, _, value = arguments[before[-1]].lstrip("-").partition("=")
  if name not in flags.FLAGS or flags.FLAGS[name].boolean:
    return ""
  words = [value] if value else []
  for argument in arguments[before[-1] + 1 :]:
    if argument.startswith("-"):
      break
    words.append(argument)
  return f'; a value with spaces needs quotes: --{name}="{" ".join(words)}"'


def refuse_config(arguments: Iterable[str]) -> None:
  """Raises UserError if the arguments contain --config or --print_config."""
  for argument in arguments:
    if match := re.match(r"--?(?:no)?(config|print_config)(?![\w-])", argument):
      raise UserError(f"--{match[1]} is not a flag of this command: --help lists its flags.")


def check_workdir(workdir: str, begins: bool, takes_bundles: bool = True) -> None:
  """Raises UserError if --workdir names neither a folder nor an installed model.

  `begins` says whether the command creates the folder, and `takes_bundles` whether it accepts a
  bundle in place of a run.
  """
  path = pathlib.Path(workdir)
  if "://" in workdir:
    return
  if path.is_file():
    raise UserError(f"--workdir is {workdir}, which is a file: name a folder.")
  if begins or path.exists():
    return
  if (MODELS / workdir).is_dir():
    if takes_bundles:
      return
    raise UserError(
      f"{workdir} is a bundle, but this command needs the folder of a run: `cm3leon prepare_data` "
      "begins a run."
    )
  installed = sorted(path.name for path in MODELS.iterdir())
  if close := difflib.get_close_matches(workdir, installed, 1, cutoff=0.8):
    raise UserError(f"{workdir} is neither a folder nor a bundle: did you mean {close[0]}?")
  raise UserError(
    f"there is no folder {workdir}: name the folder of a run with --workdir; "
    "`cm3leon prepare_data` begins a run."
  )


def check_places() -> None:
  """Raises UserError if a flag names an output path whose parent is a file."""
  for name in ("workdir", "out", "output", "bundle"):
    value = flags.FLAGS[name].value if name in flags.FLAGS else None
    if not value or "://" in value:
      continue
    above = next((p for p in pathlib.Path(value).absolute().parents if p.exists()), None)
    if above is not None and not above.is_dir():
      raise UserError(f"--{name} is {value}, but {above} is not a folder: name another path.")


def parse(argv: list[str], config: bool) -> list[str]:
  """Parses all flags except the config's. Returns the program name and the non-flag arguments.

  `config` says whether the command takes a config. Raises UserError for a wrong flag or value.
  """
  _, others = split(argv[1:])
  try:
    return flags.FLAGS([argv[0], *others])
  except flags.UnrecognizedFlagError as error:
    raise UserError(_unknown(error.flagname, config)) from error
  except (flags.Error, ValueError) as error:  # absl raises ValueError for --noNAME=VALUE.
    raise UserError(wrong_value(error)) from error


def _unknown(name: str, config: bool) -> str:
  """Returns the message for an unknown flag, which suggests a flag or config fields."""
  fields = config_file.field_names() if config else ()
  same_name = [field for field in fields if name in (field, field.partition(".")[2])]
  same_name.sort(key=lambda field: (not field.startswith("train."), field))
  if same_name:
    flag = f"--config.{' or --config.'.join(same_name)}"
    return f"--{name} is not a flag of this command; a field of the config is set by {flag}."
  known = [flag for flag in flags.FLAGS if config or not flag.startswith("config")]
  close = difflib.get_close_matches(name, known, 1)
  hint = f"did you mean --{close[0]}?" if close else "--help lists its flags."
  return f"--{name} is not a flag of this command: {hint}"


def wrong_value(error: flags.Error | ValueError) -> str:
  """Returns the message for a value that absl rejects.

  "flag --keep_last=1: 1 is not integer >= 2"
  "--keep_last is 1; it must be an integer >= 2."
  """
  if match := re.match(r"--no(\w+)=(.*) does not take an argument$", str(error), re.DOTALL):
    return f"--no{match[1]} takes no value: write --{match[1]}={match[2]} or --no{match[1]}."
  if match := re.match(r"flag --([\w.]+)=None: Flag --.* must have a value", str(error)):
    return f"--{match[1]} is missing: --help shows an example."
  match = re.match(r"flag --([\w.]+)=(.*?): ", str(error), re.DOTALL)
  if not match or not isinstance(error, flags.IllegalFlagValueError):
    return str(error)
  name, value = match.groups()
  parser = flags.FLAGS[name].parser
  what = parser.syntactic_help
  if isinstance(parser, flags.EnumParser):
    what = f"one of {', '.join(parser.enum_values)}"
  elif isinstance(parser, flags.BooleanParser):
    what = "true or false"
  article = {"integer": "an ", "number": "a "}.get(what.partition(" ")[0], "")
  return f"--{name} is {value}; it must be {article}{what}." if what else str(error)

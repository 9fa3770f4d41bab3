"""Explains in one sentence what is wrong with a flag, and what would be right."""

import difflib
import re

from absl import flags

from cm3leon_jax.commands import config_file


def unknown(name: str, config: bool) -> str:
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

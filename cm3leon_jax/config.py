"""Checks of a user's config: an `ml_collections.ConfigDict` becomes frozen dataclasses."""

import dataclasses
import difflib
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
  import pydantic

T = TypeVar("T")

# Exit codes of a run that was asked to stop, after it has saved or if there was nothing to save.
INTERRUPTED = 75  # By SIGTERM; EX_TEMPFAIL: a scheduler starts the command again.
CTRL_C = 130  # As of a shell.

# Sections convert no types but int to float, and refuse unknown fields, NaN and infinity; the line
# under a field is its description.
STRICT: "pydantic.ConfigDict" = {
  "strict": True,
  "extra": "forbid",
  "allow_inf_nan": False,
  "use_attribute_docstrings": True,
}


class UserError(ValueError):
  """A user's mistake in one sentence: what is wrong, where, what to do. Sets the exit code."""

  exit_code = 2


class FieldError(UserError):
  """A wrong value of a section.

  Attributes:
    path: names and places that lead to the value, ("shape", 1); () if no single value is wrong.
  """

  def __init__(self, message: str, path: tuple[str | int, ...] = ()):
    super().__init__(message)
    self.path = path


class TryAgain(UserError):
  """A resource that was not available in time: a scheduler may start the command again."""

  exit_code = 1


def build(cls: type[T], values, where: str = "") -> T:
  """Makes the dataclass `cls` from a mapping and names the wrong field when that fails.

    build(TrainConfig, {"steps": 0}, "train")
    UserError: config.train.steps is 0; it must be greater than 0.

  Args:
    cls: a pydantic dataclass with the config `STRICT`.
    values: ConfigDict or dict of its fields; lists become tuples.
    where: name of the section in the config, for messages; empty for the config itself.

  Raises:
    FieldError: an unknown or absent field, a value of another type than the field's, or one out of
      range.
  """
  import pydantic  # Not at the top: commands import this module for --help.

  values = {k: tuple(v) if isinstance(v, list) else v for k, v in dict(values).items()}
  try:
    return cls(**values)
  except pydantic.ValidationError as error:
    place = f"config.{where}" if where else "config"
    # Unknown fields first: of a misspelled field it says more than that the right one is absent.
    first, *_ = sorted(error.errors(), key=lambda e: e["type"] != "unexpected_keyword_argument")
    raise FieldError(_sentence(dict(first), cls, place), first["loc"]) from error


def _sentence(error: dict, cls: type, where: str) -> str:
  """Turns an error of pydantic into a sentence."""
  field = ".".join([where, *map(str, error["loc"])])
  match error["type"]:
    case "unexpected_keyword_argument":
      name, fields = error["loc"][0], [f.name for f in dataclasses.fields(cls)]
      close = difflib.get_close_matches(name, fields, 1)
      hint = f"did you mean '{close[0]}'?" if close else f"it has {', '.join(fields)}."
      return f"{where} has no field '{name}': {hint}"
    case "missing":
      return f"{where} has no field '{error['loc'][0]}', which it needs."
    case "value_error":  # Of a `__post_init__`.
      return f"{field}: {error['ctx']['error']}"
  _, should, rule = error["msg"].partition(" should ")
  if not should:
    return f"{field}: {error['msg']}."
  for long, short in (
    ("greater than or equal to", "at least"),
    ("less than or equal to", "at most"),
  ):
    rule = rule.replace(long, short)
  return f"{field} is {error['input']!r}; it must {rule}."

"""From a user's `ml_collections.ConfigDict` to the frozen dataclasses that the library takes."""

import dataclasses
import difflib
import math
import typing
from typing import Any, TypeVar

T = TypeVar("T")


class UserError(ValueError):
  """A mistake of the user's, told in one sentence: what, where, what would be right. A command exits with `exit_code`."""

  exit_code = 2


class TryAgain(UserError):
  """What the command needs was not there in time; told in one sentence, too, but a scheduler may start it again."""

  exit_code = 1


def build(cls: type[T], values, where: str) -> T:
  """Makes the dataclass `cls` from a mapping and names the field when that fails.

  Args:
    cls: a frozen dataclass with scalar or tuple fields; its `__post_init__` validates.
    values: ConfigDict or dict; lists become tuples.
    where: name of the section in the config, for messages.

  Raises:
    UserError: an unknown field, a value of another type than the field's, or one that `cls` refuses.
  """
  hints = typing.get_type_hints(cls)
  fields = {f.name: hints[f.name] for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
  kwargs = {}
  for name, value in dict(values).items():
    if name not in fields:
      close = difflib.get_close_matches(name, fields, 1)
      hint = f"did you mean '{close[0]}'?" if close else f"it has {', '.join(fields)}."
      raise UserError(f"config.{where} has no field '{name}': {hint}")
    kwargs[name] = _checked(value, fields[name], f"config.{where}.{name}")
  try:
    return cls(**kwargs)
  except (TypeError, ValueError) as error:
    raise UserError(f"config.{where}: {error}") from error


def _checked(value: Any, hint: Any, where: str) -> Any:
  kind = typing.get_origin(hint) or hint
  if kind is tuple:
    if not isinstance(value, list | tuple):
      raise UserError(f"{where} is {value!r}; it must be a tuple.")
    return tuple(value)
  if kind is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  if kind in (int, float, str, bool) and (
    not isinstance(value, kind) or (kind is int and isinstance(value, bool))
  ):
    raise UserError(f"{where} is {value!r}; it must be {kind.__name__}.")
  if kind is float and not math.isfinite(value):
    raise UserError(f"{where} is {value}; it must be a finite number.")
  return value

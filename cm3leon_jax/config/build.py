"""Converts a user's `ml_collections.ConfigDict` to frozen dataclasses and checks the values."""

import dataclasses
import math
import os
from typing import TYPE_CHECKING, Any, TypeVar

from cm3leon_jax.errors import FieldError, did_you_mean, short

if TYPE_CHECKING:
  import pydantic

T = TypeVar("T")

LARGEST = 2**31 - 1  # Largest absolute value of an integer, since counters are int32.
# Smallest and largest absolute value of a nonzero float. With this range, the product and the
# quotient of two floats are finite in float32.
SIZES = 1e-20, 1e12


# Dataclasses with this config convert ints to floats, and otherwise only accept values of the right
# type. They refuse unknown fields, NaN and infinity. The docstring under a field describes the
# field.
STRICT: "pydantic.ConfigDict" = {
  "strict": True,
  "extra": "forbid",
  "allow_inf_nan": False,
  "use_attribute_docstrings": True,
}


def build(cls: type[T], values: Any, where: str = "") -> T:
  """Builds an instance of the dataclass `cls` from a mapping. Errors name the wrong field.

    build(TrainConfig, {"steps": 0}, "train")
    UserError: config.train.steps is 0; it must be greater than 0.

  Args:
    cls: a pydantic dataclass with the config `STRICT`.
    values: ConfigDict or dict from field names to values; lists become tuples, `~` the home folder.
    where: name of the section, for messages; "" for the whole config.

  Raises:
    FieldError: a field is unknown or missing, or a value has a wrong type or is out of range.
  """
  import pydantic  # Imported here because --help imports this module and must be fast.

  place = f"config.{where}" if where else "config"
  try:
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in dict(values).items()}
    values |= {k: os.path.expanduser(v) for k, v in values.items() if isinstance(v, str)}
  except (TypeError, ValueError) as error:
    raise FieldError(f"{place} is {short(values)}; it must map field names to values.") from error
  for name, value in values.items():
    if not isinstance(name, str):
      raise FieldError(f"{place} has the field {short(name)}; a name must be a string.")
    _check_size(value, (name,), place)
  try:
    return cls(**values)
  except pydantic.ValidationError as error:
    # Report unknown fields first: a misspelled name explains why the correct name is missing.
    first, *_ = sorted(error.errors(), key=lambda e: e["type"] != "unexpected_keyword_argument")
    raise FieldError(_sentence(dict(first), cls, place), first["loc"]) from error


def _check_size(value: Any, path: tuple[str | int, ...], where: str) -> None:
  """Raises FieldError for a number beyond LARGEST or outside SIZES."""
  field = ".".join([where, *map(str, path)])
  is_number = isinstance(value, float) and math.isfinite(value) and value != 0
  if is_number and not SIZES[0] <= abs(value) <= SIZES[1]:
    raise FieldError(
      f"{field} is {value}; it must be 0, or from 1e-20 to 1e12 in absolute value.", path
    )
  if isinstance(value, int) and abs(value) > LARGEST:
    bound = "less than 2^31" if value > 0 else "greater than -2^31"
    raise FieldError(f"{field} is {short(value)}; it must be {bound}.", path)
  for i, inner in enumerate(value if isinstance(value, tuple) else ()):
    _check_size(inner, (*path, i), where)


def _sentence(error: dict, cls: type, where: str) -> str:
  """Converts a pydantic error to a message."""
  field = ".".join([where, *map(str, error["loc"])])
  match error["type"]:
    case "unexpected_keyword_argument":
      name, fields = error["loc"][0], [f.name for f in dataclasses.fields(cls)]
      hint = did_you_mean(name, fields, f"it has {', '.join(fields)}.")
      return f"{where} has no field '{name}': {hint}"
    case "missing":
      return f"{where} has no field '{error['loc'][0]}', which is required."
    case "value_error":  # A `__post_init__` raised the error.
      return f"{field}: {error['ctx']['error']}"
  _, should, rule = error["msg"].partition(" should ")
  if not should:
    return f"{field}: {error['msg']}."
  rule = rule.replace("greater than or equal to", "at least")
  rule = rule.replace("less than or equal to", "at most")
  return f"{field} is {short(error['input'])}; it must {rule}."

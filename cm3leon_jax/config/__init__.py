"""Converts a user's `ml_collections.ConfigDict` to frozen dataclasses and checks the values."""

from collections.abc import Iterable, Iterator
import dataclasses
import difflib
import math
import os
import re
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
  import pydantic

T = TypeVar("T")

# Exit codes of a run that a signal stopped. The run saved its state before it stopped, if it had
# any state to save.
INTERRUPTED = 75  # SIGTERM. The code is EX_TEMPFAIL, so a scheduler starts the command again.
CTRL_C = 130  # Ctrl-C. Shells use the same code.
STOPPED_EARLY = (
  "stopped outside of the training steps: there was nothing to save; the same command continues."
)
LARGEST = 2**31 - 1  # Largest absolute value of an integer, since counters are int32.
LONGEST = 4_000  # Largest number of characters of an error message.
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
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+(?=>)")


def without_addresses(text: str) -> str:
  """Removes memory addresses of objects from an error message, since they differ in each run.

  without_addresses("<_io.BytesIO object at 0x7f3a5c0b1d00>") = "<_io.BytesIO object>"
  """
  return _ADDRESS.sub("", text)


def printable(text: str) -> str:
  """Replaces control characters and lone surrogates with spaces.

  printable("a\\x1b[31mb") = "a [31mb"
  """
  return "".join(c if c.isprintable() else " " for c in text)


def short(value: Any) -> str:
  """Returns `repr(value)`, cut to 80 characters. If `repr` fails, returns a description."""
  try:
    text = without_addresses(repr(value))
  except (ValueError, RecursionError):  # An int with too many digits, or deeply nested values.
    text = f"a {type(value).__name__} too long to show"
  return text if len(text) <= 80 else f"{text[:80]}..."


def causes(error: BaseException | None) -> Iterator[BaseException]:
  """Yields an error, all errors that caused it, and the members of exception groups.

  Each error is yielded once, because some libraries raise errors whose causes form a cycle.
  """
  waiting, seen = [error], set[int]()
  while waiting:
    found = waiting.pop()
    if found is None or id(found) in seen:
      continue
    seen.add(id(found))
    yield found
    waiting.append(found.__cause__ or (None if found.__suppress_context__ else found.__context__))
    if isinstance(found, BaseExceptionGroup):
      waiting += found.exceptions


class UserError(ValueError):
  """Error that a user's mistake caused. The message says what is wrong, where, and what to do.

  The message may quote an untrusted file or a library's error. So control characters become spaces,
  and memory addresses are removed. If a message is longer than LONGEST characters, only its start
  and its end are kept.
  """

  exit_code = 2

  def __init__(self, message: object = ""):
    text = str(message)
    if len(text) > LONGEST:
      text = f"{text[: LONGEST - 500]} [...] {text[-500:]}"
    super().__init__(printable(without_addresses(text)))


class FieldError(UserError):
  """Error for a wrong value in a section of the config.

  `path` contains the field names and indices that lead to the value, such as ("shape", 1). It is ()
  if the error concerns several values.
  """

  def __init__(self, message: str, path: tuple[str | int, ...] = ()):
    super().__init__(message)
    self.path = path


class TryAgain(UserError):
  """Error for a resource that was not available in time. A scheduler may restart the command."""

  exit_code = 1


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


def did_you_mean(name: str, names: Iterable[str], otherwise: str = "") -> str:
  """Returns a hint with the most similar name, or `otherwise` if no name is similar.

  did_you_mean("onw", ["own", "scenes"]) = "did you mean 'own'?"
  """
  close = difflib.get_close_matches(name, list(names), 1)
  return f"did you mean '{close[0]}'?" if close else otherwise


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

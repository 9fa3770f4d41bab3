"""Checks of a user's config: an `ml_collections.ConfigDict` becomes frozen dataclasses."""

from collections.abc import Iterator
import dataclasses
import difflib
import math
import re
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
  import pydantic

T = TypeVar("T")

# Exit codes of a run that was asked to stop, after it has saved or if there was nothing to save.
INTERRUPTED = 75  # By SIGTERM; EX_TEMPFAIL: a scheduler starts the command again.
CTRL_C = 130  # As of a shell.
STOPPED_EARLY = (
  "stopped outside of the training steps: nothing was to be saved; the same command continues."
)
LARGEST = 2**31 - 1  # Of whole numbers: counters are int32, and lists of any length are built.
LONGEST = 4_000  # Characters of a sentence.
SIZES = 1e-20, 1e12  # Of other numbers but 0: products and quotients of two stay finite in float32.

# Sections convert no types but int to float, and refuse unknown fields, NaN and infinity; the line
# under a field is its description.
STRICT: "pydantic.ConfigDict" = {
  "strict": True,
  "extra": "forbid",
  "allow_inf_nan": False,
  "use_attribute_docstrings": True,
}
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+(?=>)")


def without_addresses(text: str) -> str:
  """Removes the addresses of objects, which differ in each run, as in the errors of libraries.

  without_addresses("<_io.BytesIO object at 0x7f3a5c0b1d00>") = "<_io.BytesIO object>"
  """
  return _ADDRESS.sub("", text)


def printable(text: str) -> str:
  """Replaces each character that a terminal would obey, and half a surrogate pair, by a space.

  printable("a\\x1b[31mb") = "a [31mb"
  """
  return "".join(c if c.isprintable() else " " for c in text)


def short(value: Any, most: int = 80) -> str:
  """Returns `repr(value)`, cut after `most` characters; of any value, also a number too long."""
  try:
    text = without_addresses(repr(value))
  except (ValueError, RecursionError):  # More digits than Python writes; or nested too deeply.
    text = f"a {type(value).__name__} too long to show"
  return text if len(text) <= most else f"{text[:most]}..."


def causes(error: BaseException | None) -> Iterator[BaseException]:
  """Yields an error and those that led to it, of a group its members, too.

  Each comes once: libraries have raised errors that led to one another in a circle.
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
  """A user's mistake in one sentence: what is wrong, where, what to do. Sets the exit code.

  The sentence may quote a stranger's file: its control characters become spaces, and of more than
  LONGEST characters the middle is left out. It may quote a library's error: it loses addresses of
  objects.
  """

  exit_code = 2

  def __init__(self, message: object = ""):
    text = str(message)
    if len(text) > LONGEST:
      text = f"{text[: LONGEST - 500]} [...] {text[-500:]}"
    super().__init__(printable(without_addresses(text)))


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


def build(cls: type[T], values: Any, where: str = "") -> T:
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

  place = f"config.{where}" if where else "config"
  try:
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in dict(values).items()}
  except (TypeError, ValueError) as error:
    raise FieldError(f"{place} is {short(values)}; it must have fields by their names.") from error
  if wrong := [name for name in values if not isinstance(name, str)]:
    raise FieldError(f"{place} has the field {short(wrong[0])}; a name must be a string.")
  for name, value in values.items():
    _check_value(value, (name,), place)
  try:
    return cls(**values)
  except pydantic.ValidationError as error:
    # Unknown fields first: of a misspelled field it says more than that the right one is absent.
    first, *_ = sorted(error.errors(), key=lambda e: e["type"] != "unexpected_keyword_argument")
    raise FieldError(_sentence(dict(first), cls, place), first["loc"]) from error


def _check_value(value: Any, path: tuple[str | int, ...], where: str) -> None:
  """Raises FieldError at a number outside of LARGEST or SIZES, or half a surrogate pair."""
  field = ".".join([where, *map(str, path)])
  if isinstance(value, str) and any("\ud800" <= c <= "\udfff" for c in value):
    raise FieldError(f"{field} is {short(value)}; it must be valid Unicode.", path)
  is_number = isinstance(value, float) and math.isfinite(value) and value != 0
  if is_number and not SIZES[0] <= abs(value) <= SIZES[1]:
    raise FieldError(f"{field} is {value}; it must be 0, or of a size from 1e-20 to 1e12.", path)
  if isinstance(value, int) and abs(value) > LARGEST:
    bound = "less than 2^31" if value > 0 else "greater than -2^31"
    raise FieldError(f"{field} is {short(value)}; it must be {bound}.", path)
  for i, inner in enumerate(value if isinstance(value, tuple) else ()):
    _check_value(inner, (*path, i), where)


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
  for long, brief in (
    ("greater than or equal to", "at least"),
    ("less than or equal to", "at most"),
  ):
    rule = rule.replace(long, brief)
  return f"{field} is {short(error['input'])}; it must {rule}."

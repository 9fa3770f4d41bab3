"""Defines the errors that users see, and what their messages quote."""

from collections.abc import Iterable, Iterator
import difflib
import re
from typing import Any

# Exit codes of a run that a signal stopped. The run saved its state before it stopped, if it had
# any state to save.
INTERRUPTED = 75  # SIGTERM. The code is EX_TEMPFAIL, so a scheduler starts the command again.
CTRL_C = 130  # Ctrl-C. Shells use the same code.
STOPPED_EARLY = (
  "stopped outside of the training steps: there was nothing to save; the same command continues."
)
LONGEST = 4_000  # Largest number of characters of an error message.
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
    one = waiting.pop()
    if one is None or id(one) in seen:
      continue
    seen.add(id(one))
    yield one
    waiting.append(one.__cause__ or (None if one.__suppress_context__ else one.__context__))
    if isinstance(one, BaseExceptionGroup):
      waiting += one.exceptions


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


def did_you_mean(name: str, names: Iterable[str], otherwise: str = "") -> str:
  """Returns a hint with the most similar name, or `otherwise` if no name is similar.

  did_you_mean("onw", ["own", "scenes"]) = "did you mean 'own'?"
  """
  close = difflib.get_close_matches(name, list(names), 1)
  return f"did you mean '{close[0]}'?" if close else otherwise

"""Reads folders from untrusted sources: bundles and exports."""

from collections.abc import Callable, Iterable
import functools
import os
import tokenize
from typing import Any, TypeVar

from etils import epath

from cm3leon_jax.errors import FieldError, UserError, short
from cm3leon_jax.files import buckets
from cm3leon_jax.files.atomic import exists
from cm3leon_jax.files.json_files import check_foreign, check_foreign_json

F = TypeVar("F", bound=Callable[..., Any])
# Errors that parsers raise for wrong content. NumPy parses the headers of arrays as Python.
WRONG = (
  ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError, EOFError,
  FileNotFoundError, NotADirectoryError, SyntaxError, tokenize.TokenError,
)  # fmt: skip


def check_folder(folder: epath.PathLike, parts: Iterable[str] = ()) -> list[str]:
  """Checks the files in a folder and below its subfolders `parts`, before they are opened.

  Returns the names of the files. A file may be a link, as package managers and model hubs make it.

  Raises:
    UserError: there is a device, a pipe, a link to a folder, or a JSON file that is too large.
  """
  folder, names = epath.Path(folder), []
  places = [folder / part for part in ("", *parts)]
  for place in places:
    if place != folder and os.path.islink(place):
      raise UserError(f"{place} is a link to a folder: replace it by the folder.")
    for path in place.iterdir() if place.exists() else ():
      if path.is_dir():
        places += [path] if place != folder else []
      if path.is_dir() or not exists(path):  # A link may lead nowhere.
        continue
      is_json = path.name.endswith((".json", "_METADATA"))
      (check_foreign_json if is_json else check_foreign)(path)
      names.append(path.relative_to(folder).as_posix())
  return names


def reads(kind: str, place: int = 0) -> Callable[[F], F]:
  """Decorates a reader of a folder: all errors that wrong content causes become a UserError.

  The argument number `place` of the reader is the folder, or has it as the attribute `folder`.
  """

  def decorate(read: F) -> F:
    @functools.wraps(read)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
      try:
        return read(*args, **kwargs)
      except FieldError as error:
        raise UserError(f"{getattr(args[place], 'folder', args[place])}: {error}") from error
      except UserError:
        raise
      except WRONG as error:
        if buckets.failure(error):
          raise
        folder = getattr(args[place], "folder", args[place])
        reason = f"{type(error).__name__}: {short(str(error))}"
        raise UserError(f"{folder} is not {kind}, or is damaged ({reason}).") from error

    return wrapped  # type: ignore[return-value]

  return decorate

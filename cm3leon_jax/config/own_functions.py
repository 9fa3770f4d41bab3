"""Imports functions of a user, which fields of the config name as FILE.py:FUNCTION.

Only the run's own --config may name a file. Therefore only commands that take --config import one.
The settings that a bundle, a base, a run or an export stored are foreign: no file that they name is
imported.
"""

from collections.abc import Callable, MutableMapping
import importlib.util
import pathlib
import sys
import traceback
from types import ModuleType
from typing import Any

from cm3leon_jax.errors import UserError

# Fields of the config that may name a function: (section, field).
FIELDS = (("raw", "source"), ("evaluation", "judge"), ("reinforce", "reward"))


def is_function(value: str) -> bool:
  """Returns whether a value names a function: is_function("path/own.py:blue") = True."""
  file, _, function = value.rpartition(":")
  return file.endswith(".py") and function.isidentifier()


def absolute(value: str, folder: str | pathlib.Path = "") -> str:
  """Makes the file of a function absolute, if `value` names a function; `folder` has the file."""
  if not is_function(value):
    return value
  file, _, function = value.rpartition(":")
  return f"{pathlib.Path(folder, file).expanduser().absolute()}:{function}"


def resolve(config: MutableMapping[str, Any], folder: str | pathlib.Path = "") -> None:
  """Makes the files of all functions in a config absolute; they are relative to `folder`."""
  for section, field in FIELDS:
    if isinstance(value := config.get(section, {}).get(field), str):
      config[section][field] = absolute(value, folder)


def load(value: str, field: str) -> Callable[..., Any]:
  """Imports the function FILE.py:FUNCTION, which the config names in `field`.

  Raises:
    UserError: the file does not exist, or does not define the function.
  """
  file, _, name = value.rpartition(":")
  if not pathlib.Path(file).is_file():
    raise UserError(f"config.{field} is '{value}', but the file {file} does not exist.")
  function = getattr(load_module(file), name, None)
  if function is None:
    raise UserError(f"config.{field} is '{value}', but {file} does not define {name}.")
  return function


def load_module(file: str | pathlib.Path) -> ModuleType:
  """Imports a file. A file in a package can import the other modules of its package.

  If the file's folder has an __init__.py, the file is imported under its full name, such as
  examples.scenes.source; if needed, the folder of the outermost package is added to `sys.path`.

  Raises:
    UserError: the file, or one that it imports, has a syntax error or imports a missing module.
  """
  try:
    return _load(pathlib.Path(file).absolute())
  except SyntaxError as error:
    raise UserError(f"{error.filename}, line {error.lineno}: {error.msg}.") from error
  except ImportError as error:
    last = traceback.extract_tb(error.__traceback__)[-1]
    raise UserError(f"{last.filename}, line {last.lineno}: {error.msg}.") from error


def _load(path: pathlib.Path) -> ModuleType:
  names, folder = [path.stem], path.parent
  while (folder / "__init__.py").exists():
    names.insert(0, folder.name)
    folder = folder.parent
  if len(names) > 1:
    if importlib.util.find_spec(names[0]) is None:
      sys.path.insert(0, str(folder))
    module = importlib.import_module(".".join(names))
    if pathlib.Path(str(module.__file__)).absolute() == path:
      return module
  spec = importlib.util.spec_from_file_location(f"own_{path.stem}", path)
  assert spec is not None
  assert spec.loader is not None
  module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module

"""Loads the value of --config: a shipped config or Python file, with a variant after a colon."""

import ast
from collections.abc import Sequence
import difflib
import functools
import importlib.util
import pathlib
import re
import traceback

from absl import flags
import ml_collections

from cm3leon_jax import configs
from cm3leon_jax.config import UserError

FOLDER = pathlib.Path(configs.__file__).parent
# Names of the shipped configs. `base` has the values that the configs share, and is not a config.
SHIPPED = sorted(p.stem for p in FOLDER.glob("*.py") if p.stem not in ("__init__", "base"))


def find(name: str) -> pathlib.Path:
  """Returns the file of a config, given by name or path: find("scenes"), find("path/own.py").

  Outside a checkout, "ml_configs/scenes.py" (the path in a checkout) also finds "scenes".

  Raises:
    UserError: no file and no shipped config has this name.
  """
  path = pathlib.Path(name)
  shipped = path.stem if name == f"ml_configs/{path.stem}.py" else name
  if shipped in SHIPPED and not path.is_file():
    return FOLDER / f"{shipped}.py"
  if not path.is_file():
    raise UserError(
      f"--config={name}: there is no such file; name a Python file with a get_config function, or "
      f"a shipped config: {', '.join(SHIPPED)}."
    )
  return path


def load(value: str) -> ml_collections.ConfigDict:
  """Runs get_config of a config file: load("scenes:15") calls get_config("15") of scenes.

  Raises:
    UserError: the file does not exist, raises an error or has no get_config, or get_config does not
      return a ConfigDict.
  """
  name, *variant = value.split(":", 1)
  path = find(name)
  spec = importlib.util.spec_from_file_location("config", path)
  if spec is None or spec.loader is None:
    raise UserError(f"--config={name}: a config is a Python file, whose name ends in .py.")
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
    get_config = getattr(module, "get_config", None)
    config = get_config(*variant) if callable(get_config) else None
  except UserError:
    raise
  except Exception as error:
    line = traceback.extract_tb(error.__traceback__)[-1]
    raise UserError(
      f"--config={value} cannot be loaded: {type(error).__name__}: {error} "
      f"({line.filename}, line {line.lineno})."
    ) from error
  if get_config is None:
    raise UserError(
      f"--config={name}: the file has no function get_config; "
      "it must have one that returns a config."
    )
  if not isinstance(config, ml_collections.ConfigDict):
    raise UserError(
      f"--config={name}: get_config returns {type(config).__name__}; "
      "it must return an ml_collections.ConfigDict."
    )
  return config


def _module(name: str) -> ast.Module:
  """Parses the source of a module of the package without importing the module."""
  path = FOLDER.parents[1] / f"{name.replace('.', '/')}.py"
  return ast.parse(path.read_text(encoding="utf-8"))


def _annotated(module: ast.Module, name: str) -> dict[str, ast.expr]:
  """Returns the field annotations of class `name` in a parsed module, by field name."""
  (found,) = (n for n in module.body if isinstance(n, ast.ClassDef) and n.name == name)
  fields = [node for node in found.body if isinstance(node, ast.AnnAssign)]
  return {f.target.id: f.annotation for f in fields if isinstance(f.target, ast.Name)}


@functools.cache
def field_names() -> tuple[str, ...]:
  """Returns the names of all config fields, such as train.steps, from the source of their classes.

  Importing the classes would import JAX. That takes seconds, too long to report a misspelled flag.
  """
  settings = _module("cm3leon_jax.settings")
  imports = [node for node in settings.body if isinstance(node, ast.ImportFrom)]
  modules = {alias.name: node.module for node in imports for alias in node.names}
  names = []
  for section, annotation in _annotated(settings, "Settings").items():
    module = modules.get(ast.unparse(annotation)) or ""
    if not module.startswith("cm3leon_jax."):
      names.append(section)
      continue
    fields = _annotated(_module(module), ast.unparse(annotation))
    names += [f"{section}.{field}" for field in fields]
  return tuple(names)


def config_fields(config: ml_collections.ConfigDict, prefix: str = "") -> list[str]:
  """Returns the names of all fields of a config, such as train.steps, without section names."""
  names = []
  for key, value in config.items():
    inner = isinstance(value, ml_collections.ConfigDict)
    names += config_fields(value, f"{prefix}{key}.") if inner else [f"{prefix}{key}"]
  return names


def unknown_field(known: Sequence[str], arguments: list[str]) -> str:
  """Returns the message for the first flag whose field is unknown.

  "--config.train.stepz: the config has no such field; did you mean --config.train.steps?"

  `known` has the names of all fields, and `arguments` is the command line.
  """
  given = [re.match(r"--?(?:no)?config\.([\w.]+)", argument) for argument in arguments]
  wrong = next((match[1] for match in given if match and match[1] not in known), "SECTION.FIELD")
  if inner := [name for name in known if name.startswith(f"{wrong}.")]:
    return f"--config.{wrong} is a section: give a field of it, such as --config.{inner[0]}."
  leaf = wrong.rpartition(".")[2]
  near = [name for name in known if name.rpartition(".")[2] == leaf]
  near.sort(key=lambda name: not name.startswith("train."))
  near = near or difflib.get_close_matches(wrong, known, 3, cutoff=0.75)
  hint = (
    f"did you mean --config.{' or --config.'.join(near)}?"
    if near
    else ("--print_config, with the other flags, lists its fields.")
  )
  return f"--config.{wrong}: the config has no such field; {hint}"


class Parser(flags.ArgumentParser):
  """Parses --config for `ml_collections.config_flags`, which adds --config.SECTION.FIELD flags."""

  def __init__(self) -> None:
    self.config = ml_collections.ConfigDict()  # The config that was parsed last.

  def parse(self, argument: str) -> ml_collections.ConfigDict:
    """Loads a config (`load`) and locks it, so that flags cannot add fields."""
    self.config = load(argument).lock()
    return self.config

  def flag_type(self) -> str:
    return "config"

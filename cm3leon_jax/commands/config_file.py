"""Loads the value of --config: a shipped config or a Python file, and a variant after a colon."""

import importlib.util
import pathlib
import traceback

from absl import flags
import ml_collections

from cm3leon_jax import configs
from cm3leon_jax.config import UserError

FOLDER = pathlib.Path(configs.__file__).parent
# By name; `base` is what they share.
SHIPPED = sorted(p.stem for p in FOLDER.glob("*.py") if p.stem not in ("__init__", "base"))


def find(name: str) -> pathlib.Path:
  """Returns the file of a config, given by name or path: find("scenes"), find("path/own.py").

  Raises:
    UserError: there is no such file and no shipped config of this name.
  """
  path = pathlib.Path(name)
  if name in SHIPPED and not path.is_file():
    return FOLDER / f"{name}.py"
  if not path.is_file():
    raise UserError(
      f"--config={name}: there is no such file; name a Python file with a get_config function, or "
      f"a shipped config: {', '.join(SHIPPED)}."
    )
  return path


def load(value: str) -> ml_collections.ConfigDict:
  """Runs get_config of a config file: load("scenes:15") calls get_config("15") of scenes.

  Raises:
    UserError: there is no such file, it raises an error, it has no get_config, or get_config does
      not return a ConfigDict.
  """
  name, *variant = value.split(":", 1)
  path = find(name)
  spec = importlib.util.spec_from_file_location("config", path)
  if spec is None:
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


class Parser(flags.ArgumentParser):
  """Parses --config for `ml_collections.config_flags`, which adds --config.SECTION.FIELD flags."""

  def parse(self, argument: str) -> ml_collections.ConfigDict:
    """Loads a config (`load`) and locks it, so that flags cannot add fields."""
    return load(argument).lock()

  def flag_type(self) -> str:
    return "config"

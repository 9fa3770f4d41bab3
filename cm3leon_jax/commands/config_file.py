"""Loads the value of --config: a shipped config or Python file, with a variant after a colon."""

import importlib.util
import pathlib

import ml_collections

from cm3leon_jax import configs
from cm3leon_jax.config import UserError, did_you_mean

FOLDER = pathlib.Path(configs.__file__).parent
# Names of the shipped configs. `base` has the values that the configs share, and is not a config.
SHIPPED = sorted(p.stem for p in FOLDER.glob("*.py") if p.stem not in ("__init__", "base"))


def load(value: str) -> ml_collections.ConfigDict:
  """Runs get_config of a config file: load("scenes:15") calls get_config("15") of scenes.

  Raises:
    UserError: there is no Python file and no shipped config of this name.
  """
  name, *variant = value.split(":", 1)
  path = pathlib.Path(name)
  if name in SHIPPED and not path.is_file():
    path = FOLDER / f"{name}.py"
  spec = importlib.util.spec_from_file_location("config", path)
  if not path.is_file() or spec is None or spec.loader is None:
    hint = did_you_mean(name, SHIPPED, "give one of them.")
    raise UserError(f"{name} is neither a Python file nor one of {', '.join(SHIPPED)}: {hint}")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(*variant)

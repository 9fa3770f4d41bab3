"""Loads the value of --config: a shipped config or Python file, with a variant after a colon."""

import pathlib

import ml_collections

from cm3leon_jax import configs
from cm3leon_jax.config import own_functions
from cm3leon_jax.errors import UserError, did_you_mean

FOLDER = pathlib.Path(configs.__file__).parent
# Names of the shipped configs. `base` has the values that the configs share, and is not a config.
SHIPPED = sorted(p.stem for p in FOLDER.glob("*.py") if p.stem not in ("__init__", "defaults"))

# Configs of the examples of a checkout.
EXAMPLES = {
  "illustrations": "illustrations/config.py",
  "scenes": "scenes/config.py",
  "scenes_instruct": "scenes/instruct.py",
  "scenes_reinforce": "scenes/reinforce.py",
}


def load(value: str) -> ml_collections.ConfigDict:
  """Runs get_config of a config file: load("own:15") calls get_config("15") of own.

  Files of functions that the config names are relative to the config file.

  Raises:
    UserError: there is no Python file and no shipped config of this name, or it is no config.
  """
  name, *variant = value.split(":", 1)
  if name in EXAMPLES:
    raise UserError(
      f"'{name}' is an example, not a config of the package: run it in a checkout, with "
      f"--config=examples/{EXAMPLES[name]}."
    )
  path = pathlib.Path(name)
  if name in SHIPPED and not path.is_file():
    path = FOLDER / f"{name}.py"
  if not path.is_file() or path.suffix != ".py":
    hint = did_you_mean(name, SHIPPED, "give one of them.")
    raise UserError(f"{name} is neither a Python file nor one of {', '.join(SHIPPED)}: {hint}")
  get_config = getattr(own_functions.load_module(path), "get_config", None)
  config = get_config(*variant) if get_config else None
  if not isinstance(config, ml_collections.ConfigDict):
    what = "get_config returns no" if get_config else "it has no function get_config that returns a"
    raise UserError(
      f"{path} is no config: {what} ml_collections.ConfigDict (docs/installation.md)."
    )
  own_functions.resolve(config, path.parent)
  return config


def check_field(config: ml_collections.ConfigDict, name: str) -> None:
  """Raises UserError if a config has no field of this name, such as "train.steps"."""
  section, where = config, "config"
  for part in name.split("."):
    names = list(section) if isinstance(section, ml_collections.ConfigDict) else []
    if part not in names:
      hint = did_you_mean(part, names, f"{where} has {', '.join(names) or 'no fields'}.")
      raise UserError(f"config.{name} is no field of the config: {hint}")
    section, where = section[part], f"{where}.{part}"

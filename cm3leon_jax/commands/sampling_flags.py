"""Defines a flag for each field of config.sampling except `guidance`, see generate."""

import dataclasses
from typing import Any

from absl import flags
import pydantic

from cm3leon_jax.config.build import build
from cm3leon_jax.config.sampling import SamplingConfig
from cm3leon_jax.config.settings import Settings
from cm3leon_jax.errors import UserError


def _define(name: str, schema: dict[str, Any]) -> flags.FlagHolder:
  about = f"config.sampling.{name}: {' '.join(schema['description'].split())}"
  if "enum" in schema:
    return flags.DEFINE_enum(name, None, schema["enum"], about, allow_override=True)
  define = flags.DEFINE_integer if schema["type"] == "integer" else flags.DEFINE_float
  return define(name, None, about, allow_override=True)  # Tests import several commands.


_FIELDS = pydantic.TypeAdapter(SamplingConfig).json_schema()["properties"]
_FLAGS = [_define(name, schema) for name, schema in _FIELDS.items() if name != "guidance"]


def given() -> dict:
  """Returns the fields of SamplingConfig that flags set. Raises UserError for a wrong value."""
  fields = {flag.name: flag.value for flag in _FLAGS if flag.value is not None}
  try:
    build(SamplingConfig, fields, "sampling")
  except UserError as error:
    raise UserError(str(error).replace("config.sampling.", "--")) from error
  return fields


def applied(settings: Settings) -> Settings:
  """Returns the settings with the fields of `given`."""
  sampling = dataclasses.replace(settings.sampling, **given())
  return dataclasses.replace(settings, sampling=sampling)

"""Writes docs/config.md: every field of a config, its type and range, its default and its meaning.

python -m cm3leon_jax.reports.config_reference
"""

import dataclasses
import json
import pathlib

import pydantic

from cm3leon_jax.settings import SECTIONS, Settings

PATH = pathlib.Path(__file__).parents[2] / "docs" / "config.md"
HEADER = """# Config

A config is a Python file with a function `get_config`; `cm3leon_jax/configs/` has the shipped ones.
Any field can be set on the command line: `--config.train.steps=100`. A command refuses unknown
fields, other types and values out of range; `--print_config` prints what it would run with.

`python -m cm3leon_jax.reports.config_reference` writes this page from the sections' dataclasses.

`seed` (int >= 0, default `0`): {seed}
"""
SECTION = """
## {name}

{text}

| field | values | default | meaning |
|---|---|---|---|
"""
TYPES = {"integer": "int", "number": "float", "string": "str", "boolean": "bool"}


def page() -> str:
  """Returns the page as Markdown."""
  seed = pydantic.TypeAdapter(Settings).json_schema()["properties"]["seed"]
  parts = [HEADER.format(seed=seed["description"])]
  for name, cls in SECTIONS.items():
    schema = pydantic.TypeAdapter(cls).json_schema()
    parts.append(SECTION.format(name=name, text=" ".join(schema["description"].split())))
    defaults = {field.name: field.default for field in dataclasses.fields(cls)}
    for field, about in schema["properties"].items():
      cells = f"`{field}`", _values(about), f"`{_show(defaults[field])}`", about["description"]
      parts.append(f"| {' | '.join(cells)} |\n")
  return "".join(parts)


def _show(value) -> str:
  return json.dumps(value) if isinstance(value, str) else repr(value)


def _values(schema: dict) -> str:
  """Type and range of a field.

  {"type": "number", "minimum": 0, "exclusiveMaximum": 1} -> "float in [0, 1)"
  """
  if "enum" in schema:
    return ", ".join(f"`{_show(value)}`" for value in schema["enum"])
  if schema["type"] == "array":
    return f"tuple of {_values(schema['items'])}"
  low, above = schema.get("minimum"), schema.get("exclusiveMinimum")
  high, below = schema.get("maximum"), schema.get("exclusiveMaximum")
  text = TYPES[schema["type"]]
  if (low, above) != (None, None) and (high, below) != (None, None):
    left = f"[{low}" if above is None else f"({above}"
    right = f"{high}]" if below is None else f"{below})"
    return f"{text} in {left}, {right}"
  if above is not None:
    text += f" > {above}"
  elif low is not None:
    text += f" >= {low}"
  if "multipleOf" in schema:
    text += f", a multiple of {schema['multipleOf']}"
  return text + (", not empty" if schema.get("minLength") else "")


if __name__ == "__main__":
  PATH.write_text(page(), encoding="utf-8")

"""Prints the page config.md: the type, range, default and meaning of every field of a config.

python -m tools.config_page > docs/config.md
"""

import dataclasses
import json
from typing import Any

import pydantic

from cm3leon_jax.config.settings import SECTIONS, Settings

HEADER = """# Config

A config is a Python file with a function `get_config`; `cm3leon_jax/configs/` has the shipped ones.
Any field can be set on the command line: `--config.train.steps=100`. Commands reject unknown
fields, wrong types and values out of range. `--print_config` prints the resulting config. Integers
must be less than 2^31. Floats must be 0 or have an absolute value from 1e-20 to 1e12.

`cm3leon docs config train.patience` prints one field, `cm3leon docs config train` a section.

| field | values | default | meaning |
|---|---|---|---|
| `seed` | int, >= 0 | `0` | {seed} |
"""
SHOWN = 10  # Largest length of a default tuple that is shown in full.
BOUNDS = {
  "minimum": ">=",
  "exclusiveMinimum": ">",
  "maximum": "<=",
  "exclusiveMaximum": "<",
  "multipleOf": "a multiple of",
  "minLength": "length >=",
}
TYPES = {"integer": "int", "number": "float", "string": "str", "boolean": "bool"}


def page() -> str:
  """Returns the page as Markdown."""
  seed = pydantic.TypeAdapter(Settings).json_schema()["properties"]["seed"]
  parts = [HEADER.format(seed=_one_line(seed))]
  for name, cls in SECTIONS.items():
    text = _one_line(pydantic.TypeAdapter(cls).json_schema())
    parts.append(f"\n## {name}\n\n{text}\n\n{table(cls)}")
  return "".join(parts)


def table(cls: type) -> str:
  """Returns a Markdown table of the fields of a dataclass."""
  rows = ["| field | values | default | meaning |\n|---|---|---|---|\n"]
  properties = pydantic.TypeAdapter(cls).json_schema()["properties"]
  for field in dataclasses.fields(cls):
    about = properties[field.name]
    cells = f"`{field.name}`", _values(about), _default(field), _one_line(about)
    rows.append(f"| {' | '.join(cells)} |\n")
  return "".join(rows)


def _default(field: dataclasses.Field) -> str:
  """Returns the default of a field, or "" if it has no default."""
  value = field.default
  if field.default_factory is not dataclasses.MISSING:
    value = field.default_factory()
  if isinstance(value, tuple) and len(value) > SHOWN:
    return f"{len(value)} names, `{_show(value[0])}` to `{_show(value[-1])}`"
  return "" if value is dataclasses.MISSING else f"`{_show(value)}`"


def _one_line(schema: dict) -> str:
  return " ".join(schema["description"].split())


def _show(value: Any) -> str:
  return json.dumps(value) if isinstance(value, str) else repr(value)


def _values(schema: dict) -> str:
  """Returns the type and range of a field.

  {"type": "number", "minimum": 0, "exclusiveMaximum": 1} -> "float, >= 0, < 1"
  """
  if "$ref" in schema:  # A nested dataclass.
    return "dict"
  if "enum" in schema:
    return ", ".join(f"`{_show(value)}`" for value in schema["enum"])
  if "prefixItems" in schema:
    return f"({', '.join(map(_values, schema['prefixItems']))})"
  if schema["type"] == "array":
    return f"tuple of {_values(schema['items'])}"
  if schema["type"] == "object":
    of = schema["additionalProperties"]
    return "dict" if of is True else f"dict of {_values(of)}"
  bounds = [f"{sign} {schema[name]}" for name, sign in BOUNDS.items() if name in schema]
  return ", ".join([TYPES[schema["type"]], *bounds])


if __name__ == "__main__":
  print(page(), end="")

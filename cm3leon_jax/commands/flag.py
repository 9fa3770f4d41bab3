"""Defines the flags of a command by a dataclass, as the sections of the config are defined.

  @dataclasses.dataclass(frozen=True)
  class Flags(flag.Fields):
    rows: PositiveInt = 6
    '''Number of rows.'''

defines --rows. Type, bounds and default are those of the field; the docstring is the help.
"""

from collections.abc import Iterable, Set
import dataclasses
import inspect
import sys
from typing import Annotated, Any, TypeAlias, TypeVar

from absl import flags
import pydantic

T = TypeVar("T")
Several: TypeAlias = tuple[str, ...]  # Values of a flag that may be given several times.
Listed: TypeAlias = Annotated[tuple[str, ...], pydantic.Field(json_schema_extra={"comma": True})]


class Fields:
  """Base class of dataclasses of flags. Commands that share flags inherit from one dataclass."""

  __pydantic_config__ = pydantic.ConfigDict(use_attribute_docstrings=True)


def one_of(values: Iterable[str]) -> Any:
  """Annotates a string that must be one of `values`."""
  return pydantic.Field(json_schema_extra={"enum": [*values]})


def of_section(section: type, name: str, without: Set[str] = frozenset()) -> Any:
  """Returns a field with the values of those fields of the section `name` that flags set.

  The flags have no bounds, because the section checks them.
  """
  schemas = pydantic.TypeAdapter(section).json_schema()["properties"]
  kept = {}
  for field in [field for field in schemas if field not in without]:
    schema = {key: value for key, value in schemas[field].items() if key in ("type", "enum")}
    about = f"config.{name}.{field}: {schemas[field]['description']}"
    kept[field] = {**schema, "default": None, "description": about}
  return dataclasses.field(default_factory=dict, metadata=kept)


def define(cls: type) -> None:
  """Defines the flags of a dataclass; --help lists them by the module of `cls` and its parents."""
  several = {field.name: field.metadata for field in dataclasses.fields(cls)}
  for base in filter(dataclasses.is_dataclass, cls.__mro__):
    module = sys.argv[0] if base.__module__ == "__main__" else base.__module__
    schemas = pydantic.TypeAdapter(base).json_schema()["properties"]
    for name in inspect.get_annotations(base):
      for each, schema in (several[name] or {name: schemas[name]}).items():
        _define(each, schema, module)


def _define(name: str, schema: dict[str, Any], module: str) -> None:
  """Defines a flag from the JSON schema of a field."""
  schema = schema | schema.get("anyOf", [{}])[0]
  values = schema.get("enum") or [*filter(None, [schema.get("const")])]
  named: dict[str, Any] = {
    "name": name,
    "help": " ".join(schema["description"].split()),
    "module_name": module,
  }
  named |= {"default": schema.get("default"), "required": "default" not in schema}
  least, most = schema.get("minimum"), schema.get("maximum")
  if "exclusiveMinimum" in schema:  # Of an integer.
    least = schema["exclusiveMinimum"] + 1
  text = {"parser": flags.ArgumentParser(), "serializer": flags.ArgumentSerializer()}
  match schema["type"]:
    case "string" if values:
      flags.DEFINE_enum(enum_values=values, **named)
    case "boolean":
      flags.DEFINE_bool(**named)
    case "integer":
      flags.DEFINE(**{**text, "parser": flags.IntegerParser(least, most)}, **named)
    case "number":
      flags.DEFINE(**{**text, "parser": flags.FloatParser(least, most)}, **named)
    case "array" if schema.get("comma"):
      flags.DEFINE(flags.ListParser(), serializer=flags.CsvListSerializer(","), **named)
    case "array":
      flags.DEFINE_multi(**text, **named)
    case _:
      flags.DEFINE(**text, **named)


def values(cls: type[T]) -> T:
  """Returns the dataclass with the values of the parsed flags."""
  result: dict[str, Any] = {}
  for field in dataclasses.fields(cls):  # type: ignore[arg-type]
    given = {name: flags.FLAGS[name].value for name in field.metadata or (field.name,)}
    if field.metadata:
      result[field.name] = {name: value for name, value in given.items() if value is not None}
    else:
      [value] = given.values()
      result[field.name] = tuple(value) if isinstance(value, list) else value
  return cls(**result)

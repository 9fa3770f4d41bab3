from collections.abc import Iterator
import dataclasses
import pickle
from typing import Any

from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
import jax
import pydantic
import pytest

from cm3leon_jax.config.settings import (
  SECTIONS,
  Settings,
  default_config,
  describe,
  settings_from_config,
)
from cm3leon_jax.errors import FieldError, UserError
from tools import config_page


def settings_with(**fields) -> Settings:
  """Returns the default settings with changed `fields`, such as `train__steps=3`."""
  config = default_config().to_dict()
  for name, value in fields.items():
    section, _, field = name.partition("__")
    if field:
      config[section][field] = value
    else:
      config[section] = value
  return settings_from_config(config)


def schemas() -> dict[tuple[str, str], dict]:
  """Returns (section, field) -> JSON schema with the type and the range."""
  found = {}
  for section, cls in SECTIONS.items():
    properties = pydantic.TypeAdapter(cls).json_schema()["properties"]
    found |= {(section, f.name): properties[f.name] for f in dataclasses.fields(cls)}
  return found


SCHEMAS = schemas()
# Type -> value of a wrong type. Only integers are converted, to floats.
OTHER_TYPE = {"object": 1, "string": 3, "boolean": 1, "integer": "3", "number": "3", "array": 3}


def wrong_values(schema: dict) -> Iterator[tuple[Any, tuple[int, ...]]]:
  """Yields (wrong value, path of the mistake in it): a wrong type, a value beyond each bound."""
  yield OTHER_TYPE[schema["type"]], ()
  step = 0.1 if schema.get("type") == "number" else 1
  if "enum" in schema:
    yield "another", ()
  beyond = {"minimum": -step, "exclusiveMinimum": 0, "maximum": step, "exclusiveMaximum": 0}
  for bound, difference in (beyond | {"multipleOf": 1}).items():
    if bound in schema:
      yield schema[bound] + difference, ()
  if "minItems" in schema:
    yield (), ()
  if "type" in schema.get("items", {}):  # Another test covers dataclasses.
    yield from (((value,), (0, *path)) for value, path in wrong_values(schema["items"]))


# Tuples that must not be empty; the page of the config does not mention this.
NOT_EMPTY = {("reinforce", "tasks"), ("evaluation", "guidance")}


def test_tuples_that_must_not_be_empty():
  assert {field for field, schema in SCHEMAS.items() if schema.get("minItems") == 1} == NOT_EMPTY


@pytest.mark.parametrize(("section", "field"), SCHEMAS)
def test_another_type_and_a_value_out_of_each_bound_are_refused(section, field):
  """Types and ranges themselves are tested by test_the_page_of_all_fields_is_current."""
  for value, path in wrong_values(SCHEMAS[section, field]):
    with pytest.raises(FieldError) as error:
      settings_with(**{f"{section}__{field}": value})
    assert error.value.path[: 1 + len(path)] == (field, *path), value
    assert str(error.value).startswith(f"config.{section}.{field}")
    with pytest.raises(ValueError, match=field):
      dataclasses.replace(SECTIONS[section](), **{field: value})


VALUES = st.none() | st.booleans() | st.integers(-9, 99) | st.floats() | st.text(max_size=3)
VALUES |= st.lists(VALUES, max_size=3) | st.dictionaries(st.text(max_size=3), VALUES, max_size=2)


@given(st.sampled_from(sorted(SCHEMAS)), VALUES)
@hypothesis_settings(max_examples=300)
def test_any_value_of_any_field_makes_settings_or_one_sentence(place, value):
  try:
    found = settings_with(**{"__".join(place): value})
  except UserError as error:
    found = str(error)
    assert found.isprintable()
  assert isinstance(found, Settings) or found.startswith("config")


def test_sections_are_static_arguments_that_can_be_replaced_pickled_and_hashed():
  settings = settings_with(train__steps=3)
  assert pickle.loads(pickle.dumps(settings)) == settings == settings_with(train__steps=3)
  assert hash(settings) == hash(settings_with(train__steps=3)) != hash(settings_with())
  assert dataclasses.asdict(settings)["train"]["steps"] == 3
  longer = dataclasses.replace(settings, train=dataclasses.replace(settings.train, steps=5), seed=2)
  assert (longer.train.steps, longer.seed) == (5, 2)
  with pytest.raises(dataclasses.FrozenInstanceError):
    settings.train.steps = 4
  traces = []

  def width(model):
    traces.append(model)
    return model.width

  width = jax.jit(width, static_argnums=0)
  assert width(settings.model) == width(settings_with().model) == 4_096
  assert len(traces) == 1


def test_describe_lists_every_field_and_marks_what_is_not_the_default():
  lines = describe(settings_with(seed=7, train__steps=5, raw__licenses=["CC0-1.0"]))
  assert lines[0] == "seed = 7  # default: 0"
  assert "train.steps = 5  # default: 41723" in lines
  assert "raw.licenses = ('CC0-1.0',)  # default: ()" in lines
  assert "raw.source = ''" in lines
  assert len([line for line in lines if "#" in line]) == 3
  assert len(lines) == 1 + sum(len(dataclasses.fields(cls)) for cls in SECTIONS.values())


@pytest.mark.parametrize(
  "row",
  [
    "| `steps` | int, > 0 | `41723` | Number of training steps. |",
    '| `family` | `"opt"`, `"modern"`, `"chameleon"` | `"opt"` | Architecture. ',
    "| `heldout_fraction` | float, >= 0, < 1 | `0.05` | ",
    "| `multipliers` | tuple of int, > 0 | `(1, 2, 4)` | ",
    "| `top_p` | float, > 0, <= 1 | `0.9` | ",
    '| `wandb` | str | `""` | ',
    "| `own_tasks` | tuple of dict | `()` | ",
    "| `image_width` | int, > 0, a multiple of 64 | `768` | ",
  ],
)
def test_rows_of_the_page_state_type_range_and_default(row):
  assert f"\n{row}" in config_page.page()

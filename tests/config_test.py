from typing import Annotated

from hypothesis import given, settings
from hypothesis import strategies as st
import ml_collections
from pydantic import Field
import pydantic.dataclasses
import pytest

from cm3leon_jax.config import STRICT, FieldError, UserError, build, without_addresses


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class Sample:
  width: Annotated[int, Field(gt=0)] = 4
  rate: float = 0.5
  name: str = "a"
  tied: bool = True
  shape: tuple[Annotated[int, Field(gt=0)], ...] = (1,)

  def __post_init__(self):
    if self.width % max(len(self.shape), 1):
      raise ValueError(f"width = {self.width} is not divisible by {len(self.shape)}.")


def test_defaults_and_overrides():
  assert build(Sample, {}, "sample") == Sample()
  values = ml_collections.ConfigDict(
    {"width": 8, "rate": 1, "name": "b", "tied": False, "shape": [2, 3]}
  )
  sample = build(Sample, values, "sample")
  assert sample == Sample(8, 1.0, "b", False, (2, 3))
  assert isinstance(sample.rate, float)
  assert isinstance(sample.shape, tuple)


def test_an_unknown_field_is_named_with_the_one_meant():
  with pytest.raises(
    UserError, match=r"^config.sample has no field 'widht': did you mean 'width'\?$"
  ):
    build(Sample, {"widht": 8}, "sample")
  with pytest.raises(UserError, match="no field 'zzz': it has width, rate"):
    build(Sample, {"zzz": 8}, "sample")
  with pytest.raises(ValueError, match="zzz"):
    Sample(zzz=8)


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({"width": 2.5}, "width is 2.5; it must be a valid integer."),
    ({"width": "3"}, "width is '3'; it must be a valid integer."),
    ({"width": True}, "width is True; it must be a valid integer."),
    ({"rate": "fast"}, "rate is 'fast'; it must be a valid number."),
    ({"rate": True}, "rate is True; it must be a valid number."),
    ({"rate": float("nan")}, "rate is nan; it must be a finite number."),
    ({"rate": float("inf")}, "rate is inf; it must be a finite number."),
    ({"tied": 1}, "tied is 1; it must be a valid boolean."),
    ({"name": None}, "name is None; it must be a valid string."),
    ({"shape": 3}, "shape is 3; it must be a valid tuple."),
    ({"shape": [1, 0]}, "shape.1 is 0; it must be greater than 0."),
    ({"shape": (1, 2.5)}, "shape.1 is 2.5; it must be a valid integer."),
    ({"width": 0}, "width is 0; it must be greater than 0."),
  ],
)
def test_another_type_or_range_is_refused_in_one_sentence(values, message):
  with pytest.raises(UserError) as error:
    build(Sample, values, "sample")
  assert str(error.value) == f"config.sample.{message}"
  with pytest.raises(ValueError, match="1 validation error for Sample"):
    Sample(**values)


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class Needed:
  name: str


def test_an_absent_field_is_named_and_the_path_of_a_wrong_one_is_known():
  with pytest.raises(UserError, match=r"^config.needed has no field 'name', which it needs\.$"):
    build(Needed, {}, "needed")
  for values, path in (
    ({"shape": [1, 0]}, ("shape", 1)),
    ({"widht": 8}, ("widht",)),
    ({"shape": (1, 2, 3)}, ()),
  ):
    with pytest.raises(FieldError) as error:
      build(Sample, values)
    assert error.value.path == path


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({"width": 2**70}, f"config.sample.width is {2**70}; it must be less than 2^31."),
    ({"width": -(2**31)}, "config.sample.width is -2147483648; it must be greater than -2^31."),
    ({"shape": [1, 2**31]}, "config.sample.shape.1 is 2147483648; it must be less than 2^31."),
    ({"rate": 10**400}, "config.sample.rate is 1000"),
    (
      {"width": 10**5_000},
      "config.sample.width is a int too long to show; it must be less than 2^31.",
    ),
    (
      {"name": "a" * 999 + "\ud800"},
      f"config.sample.name is '{'a' * 79}...; it must be valid Unicode.",
    ),
    ({"rate": 1e39}, "config.sample.rate is 1e+39; it must be 0, or of a size from 1e-20 to 1e12."),
    ({"rate": -1e-46}, "config.sample.rate is -1e-46; it must be 0, or of a size from"),
    ({1: 2}, "config.sample has the field 1; a name must be a string."),
    (3, "config.sample is 3; it must have fields by their names."),
    (None, "config.sample is None; it must have fields by their names."),
    ("ab", "config.sample is 'ab'; it must have fields by their names."),
    ({"name\x1b[2J": 1}, "config.sample has no field 'name [2J'"),
  ],
)
def test_what_no_field_holds_is_refused_in_one_short_sentence(values, message):
  with pytest.raises(UserError) as error:
    build(Sample, values, "sample")
  assert str(error.value).startswith(message)
  assert len(str(error.value)) < 300


JSON = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
  lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
  max_leaves=4,
)


@given(
  st.dictionaries(st.sampled_from(["width", "rate", "name", "tied", "shape", "x"]), JSON) | JSON
)
@settings(max_examples=200)
def test_any_values_make_a_section_or_one_sentence(values):
  try:
    found = build(Sample, values, "sample")
  except UserError as error:
    found = str(error)
    assert found.isprintable()
  assert isinstance(found, Sample) or found.startswith("config.sample")


def test_errors_hold_nothing_that_a_terminal_obeys():
  message = str(UserError("a\x1b[31mb\x07\r\n\x9b\u202e\ud800 é猫"))
  assert message == "a [31mb       é猫"
  assert str(FieldError("\x1b", ("a",))) == " "


def test_errors_hold_no_address_of_an_object():
  assert without_addresses("<_io.BytesIO object at 0x7f3a5c0b1d00>") == "<_io.BytesIO object>"
  assert without_addresses("damaged at 0x1f, <a b>") == "damaged at 0x1f, <a b>"
  assert str(UserError(f"no image ({object()}) <f of {object()}>")) == (
    "no image (<object object>) <f of <object object>>"
  )
  with pytest.raises(UserError, match=r"^config.sample.width is <object object>"):
    build(Sample, {"width": object()}, "sample")


def test_what_fields_together_violate_names_the_section():
  with pytest.raises(UserError, match=r"^config.sample: width = 4 is not divisible by 3.$"):
    build(Sample, {"shape": (1, 2, 3)}, "sample")


def test_a_sentence_that_quotes_megabytes_keeps_its_begin_and_its_end():
  sentence = str(UserError(f"x.json: its model is '{'q' * 10_000_000}': copy it again."))
  assert len(sentence) < 4_100
  assert sentence.startswith("x.json: its model is 'qqq")
  assert sentence.endswith("qqq': copy it again.")
  assert " [...] " in sentence

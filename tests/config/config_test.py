import os
from typing import Annotated

from hypothesis import given, settings
from hypothesis import strategies as st
import ml_collections
from pydantic import Field
import pydantic.dataclasses
import pytest

from cm3leon_jax.config.build import STRICT, build
from cm3leon_jax.errors import FieldError, UserError, without_addresses
from tests.refusals import refused


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
  assert build(Sample, {"name": "~/in"}).name == os.path.expanduser("~/in")


def test_an_unknown_field_is_named_with_the_one_meant():
  with refused(FieldError, "sample", "widht", "width", path=("widht",)):
    build(Sample, {"widht": 8}, "sample")
  with refused(FieldError, "sample", "zzz", "width", path=("zzz",)):
    build(Sample, {"zzz": 8}, "sample")
  with pytest.raises(ValueError, match="zzz"):
    Sample(zzz=8)


@pytest.mark.parametrize(
  "values",
  [
    {"width": 2.5},
    {"width": "3"},
    {"width": True},
    {"rate": "fast"},
    {"rate": True},
    {"rate": float("nan")},
    {"rate": float("inf")},
    {"tied": 1},
    {"name": None},
    {"shape": 3},
    {"shape": [1, 0]},
    {"shape": (1, 2.5)},
    {"width": 0},
  ],
)
def test_another_type_or_range_is_refused_in_one_sentence(values):
  [field] = values
  with refused(FieldError, f"config.sample.{field}"):
    build(Sample, values, "sample")
  with pytest.raises(ValueError, match="1 validation error for Sample"):
    Sample(**values)


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class Needed:
  name: str


def test_an_absent_field_is_named_and_the_path_of_a_wrong_one_is_known():
  with refused(FieldError, "needed", "name", path=("name",)):
    build(Needed, {}, "needed")
  for values, path in (({"shape": [1, 0]}, ("shape", 1)), ({"shape": (1, 2, 3)}, ())):
    with refused(FieldError, path=path):
      build(Sample, values)


@pytest.mark.parametrize(
  "values",
  [{"width": 2**70}, {"width": -(2**31)}, {"shape": [1, 2**31]}, {"rate": 1e39}, {"rate": -1e-46}],
)
def test_numbers_that_int32_and_float32_do_not_hold_are_refused(values):
  [field] = values
  with refused(FieldError, f"config.sample.{field}", "must be"):
    build(Sample, values, "sample")


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
  with refused(FieldError, "<object object>", path=("width",)):
    build(Sample, {"width": object()}, "sample")


def test_a_sentence_that_quotes_megabytes_keeps_its_begin_and_its_end():
  sentence = str(UserError(f"x.json: its model is '{'q' * 10_000_000}': copy it again."))
  assert len(sentence) < 4_100
  assert sentence.startswith("x.json: its model is 'qqq")
  assert sentence.endswith("qqq': copy it again.")
  assert " [...] " in sentence

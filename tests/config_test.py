from typing import Annotated

import ml_collections
from pydantic import Field
import pydantic.dataclasses
import pytest

from cm3leon_jax.config import STRICT, FieldError, UserError, build


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class Sample:
  width: Annotated[int, Field(gt=0)] = 4
  rate: float = 0.5
  name: str = "a"
  tied: bool = True
  shape: tuple[Annotated[int, Field(gt=0)], ...] = (1,)

  def __post_init__(self):
    if self.width % len(self.shape):
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


def test_what_fields_together_violate_names_the_section():
  with pytest.raises(UserError, match=r"^config.sample: width = 4 is not divisible by 3.$"):
    build(Sample, {"shape": (1, 2, 3)}, "sample")

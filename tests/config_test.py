import dataclasses

import ml_collections
import pytest

from cm3leon_jax.config import UserError, build


@dataclasses.dataclass(frozen=True)
class Sample:
  width: int = 4
  rate: float = 0.5
  name: str = "a"
  tied: bool = True
  shape: tuple[int, ...] = (1,)

  def __post_init__(self):
    if self.width < 1:
      raise ValueError(f"sample.width is {self.width}; it must be positive.")


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


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({"width": 2.5}, "config.sample.width is 2.5; it must be int"),
    ({"width": True}, "config.sample.width is True; it must be int"),
    ({"rate": "fast"}, "config.sample.rate is 'fast'; it must be float"),
    ({"tied": 1}, "config.sample.tied is 1; it must be bool"),
    ({"name": None}, "config.sample.name is None; it must be str"),
  ],
)
def test_another_type_is_refused(values, message):
  with pytest.raises(UserError, match=message):
    build(Sample, values, "sample")


def test_what_the_dataclass_refuses_names_the_section():
  with pytest.raises(UserError, match=r"^config.sample: sample.width is 0; it must be positive.$"):
    build(Sample, {"width": 0}, "sample")

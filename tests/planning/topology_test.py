import pytest

from cm3leon_jax.config import UserError
from cm3leon_jax.planning import topology
from tests.refusals import refused


def test_names_of_cloud_tpu_are_aliases():
  names = ("v5litepod-256", "v5lite-8", "v5litepod:4x4", "v5e-256", "v5p-8", "h100-64", "tpu")
  assert [topology.own_name(name) for name in names] == [
    "v5e-256", "v5e-8", "v5e:4x4", "v5e-256", "v5p-8", "h100-64", "tpu"
  ]  # fmt: skip
  assert all(topology.own_name(name) == name for name in topology.SLICES)


@pytest.mark.parametrize(
  ("name", "nearest"),
  [
    ("v5e-200", "v5e-256"),
    ("v5e-100", "v5e-128"),
    ("v5e-1", "v5e-4"),
    ("v6-256", "v6e-256"),
    ("a10-64", "a100-64"),
    ("nothing", None),
  ],
)
def test_the_nearest_name_is_suggested(name, nearest):
  expected = f"did you mean {nearest}? " if nearest else ""
  assert topology.suggestion(name, ["a100-64"]) == expected


def test_a_slice_that_does_not_exist_is_refused_with_the_nearest():
  with refused(UserError):
    topology.load("v5litepod-250")


@pytest.mark.parametrize("name", ["v4-8", "v3:2x2"])
def test_a_generation_that_is_not_supported_is_named(name):
  with refused(UserError):
    topology.load(name)

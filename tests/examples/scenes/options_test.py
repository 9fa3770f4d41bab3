import collections
import itertools

import pytest

from cm3leon_jax.config.build import build
from cm3leon_jax.errors import FieldError, UserError
from examples.scenes.options import CATEGORIES, COLORS, COMMON, ScenesConfig
from examples.scenes.world import number_of_scenes_of
from tests.refusals import refused


@pytest.mark.parametrize(
  ("name", "value"),
  [
    *(("objects", value) for value in ((), ("bel",), ("bell",))),
    *(("colors", value) for value in (("pinkish",), ("red", "red"), ("red",))),
    *(("rare_objects", value) for value in (0, 10_000)),
    ("categories", ("color",)),
    ("shares", (1.0,)),
    ("train", 0),
  ],
)
def test_wrong_configs_are_refused_in_one_sentence(name, value):
  with refused(FieldError, "config.raw.options", name) as error:
    build(ScenesConfig, {name: value}, "raw.options")
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("category", CATEGORIES)
def test_a_category_is_refused_if_and_only_if_it_has_no_scene(category):
  accepted = []
  for objects, colors, rare in itertools.product((1, 2, 3), (1, 2, 3), (0, 1)):
    fields = {
      "objects": tuple(COMMON)[:objects],
      "colors": tuple(COLORS)[:colors],
      "rare_objects": rare,
      "categories": (category,),
    }
    # This config bypasses the checks, which reject a config without scenes.
    count = number_of_scenes_of(collections.namedtuple("Config", fields)(**fields), category)
    try:
      build(ScenesConfig, fields, "raw.options")
    except UserError:
      assert not count
    else:
      assert count
      accepted.append(fields)
  assert accepted

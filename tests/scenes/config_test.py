"""Configs of the scenes that are refused, and why."""

import collections
import itertools

import pytest

from cm3leon_jax.config import UserError, build
from cm3leon_jax.scenes.config import CATEGORIES, COLORS, COMMON, ScenesConfig
from cm3leon_jax.scenes.world import number_of_scenes_of


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"objects": ("bel",)}, r"objects has the unknown object 'bel'; did you mean 'bell'\?"),
    ({"colors": ("pinkish",)}, r"unknown color 'pinkish'; it must be one of red, orange"),
    ({"categories": ("color",)}, r"unknown category 'color'; did you mean 'colors'\?"),
    ({"objects": ()}, r"objects is empty; it must name at least one object"),
    ({"colors": ("red", "red")}, r"colors names a color twice"),
    ({"shares": (1.0,)}, r"shares has 1 numbers; it must have one for each of the 7 categories"),
    ({"objects": ("bell",)}, r"category 'two_object' has no scene; it needs two objects"),
    ({"colors": ("red",)}, r"'color_attr' has no scene; it needs two objects and two colors"),
    ({"rare_objects": 0}, r"category 'rare' has no scene; it needs rare_objects of at least 1"),
    ({"rare_objects": 10_000}, r"rare_objects is 10000; it must be at most"),
    ({"train": 0}, r"train is 0; it must be greater than 0"),
  ],
)  # fmt: skip
def test_wrong_configs_are_refused_in_one_sentence(fields, message):
  with pytest.raises(UserError, match=message) as error:
    build(ScenesConfig, fields, "scenes")
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
    # As an unchecked config: a checked one does not exist where there is no scene.
    count = number_of_scenes_of(collections.namedtuple("Config", fields)(**fields), category)
    try:
      build(ScenesConfig, fields, "scenes")
    except UserError:
      assert not count
    else:
      assert count
      accepted.append(fields)
  assert accepted

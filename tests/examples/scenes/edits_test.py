import random
import re

from examples.scenes import edits
from examples.scenes.instructions import may_be_edited
from examples.scenes.options import COLORS, RARE, ScenesConfig
from examples.scenes.world import HELDOUT_COLOR, Placed, Scene, is_heldout_rare

CONFIG = ScenesConfig(rare_objects=100)


def test_edits_that_change_nothing_or_are_ambiguous_are_left_out():
  rng = random.Random(0)
  alone = Scene.parse("red bell top left")
  both = Scene.parse("red bell top left, red bell top right")
  full = Scene.parse(f"{both.facts_key}, red key bottom left, red cat bottom right")
  only_red = ScenesConfig(colors=("red",), categories=("colors",))
  for _ in range(50):
    assert edits.remove(alone, CONFIG, rng) is None
    assert edits.remove(both, CONFIG, rng) is None
    assert edits.recolor(alone, only_red, rng) is None
    assert edits.add(full, CONFIG, rng) is None
    swapped = edits.mirror(both, CONFIG, rng)
    assert swapped is None or "top" in swapped.instruction
    added = edits.add(both, CONFIG, rng)
    # With two bells, "the bell" would be ambiguous.
    assert added is None or "the bell" not in added.instruction


def test_an_object_is_added_in_the_row_or_column_of_the_other_if_it_is_free():
  rng, places = random.Random(0), set()
  for _ in range(300):
    edit = edits.add(Scene.parse("red bell bottom left"), CONFIG, rng)
    if re.search("(above|over) the bell", edit.instruction):
      places.update(x.place for x in edit.target.objects if x.object != "bell")
  assert places == {"top left"}
  blocked = Scene.parse("red bell bottom left, red key top left")
  for _ in range(300):
    edit = edits.add(blocked, CONFIG, rng)
    if edit and re.search("(above|over) the bell", edit.instruction):
      places.update(x.place for x in edit.target.objects if x.object not in ("bell", "key"))
  assert places == {"top left", "top right"}


def test_an_edit_shows_no_held_out_rare_object_and_nothing_held_out_beside_one():
  known, unknown = (next(x for x in RARE if is_heldout_rare(x) == is_out) for is_out in (0, 1))
  rare = Placed(known, "red", "top left")
  color = next(c for c in COLORS if c != HELDOUT_COLOR["bell"])
  bell, wrong = (
    Placed("bell", color, "top right"),
    Placed("bell", HELDOUT_COLOR["bell"], "top right"),
  )
  assert may_be_edited(Scene.of([rare, bell]))
  assert may_be_edited(Scene((rare,)))
  assert not may_be_edited(Scene.of([rare, wrong]))
  assert not may_be_edited(Scene.of([Placed(unknown, "red", "top left"), bell]))
  assert not may_be_edited(Scene((wrong,)))

from examples.scenes.judge.facts import Found, check
from examples.scenes.world import Scene

RELATED = [
  {"class": "bell", "count": 1, "color": "red"},
  {"class": "key", "count": 1, "position": ["right of", 0]},
]


def found(*texts):
  """Returns objects as found by the judge, at places given as texts, such as "red key top left"."""
  scene = Scene.parse(", ".join(texts)) if texts else Scene(())
  return [Found(x.object, x.color, x.place, 1.0, (0, 0, 1, 1)) for x in scene.objects]


def test_the_facts_of_a_caption_are_checked_one_by_one():
  right = check(found("blue key top right", "red bell bottom left"), RELATED)
  assert (right.correct, right.reason) == (True, "")
  assert right.holds == {"object": True, "count": True, "color": True, "place": True}
  for things, wrong, reason in (
    ((), {"object", "count", "color", "place"}, "expected 1 bell, found 0"),
    (("blue key top right", "red bone top left"), {"object"}, "expected 1 bell, found 0"),
    (("blue key top left", "red bell top right"), {"place"}, "expected key right of bell"),
    (("red key top right", "blue bell top left"), {"color"}, "expected bell red, found blue"),
    (
      ("blue key top right", "red bell top left", "red bell bottom left"),
      {"count"},
      "expected 1 bell, found 2",
    ),
  ):
    verdict = check(found(*things), RELATED)
    assert not verdict.correct
    assert {kind for kind, holds in verdict.holds.items() if not holds} == wrong
    assert verdict.reason.split("\n")[0] == reason


def test_all_counted_objects_have_the_color_of_the_caption():
  clauses = [{"class": "bell", "count": 2, "color": "red"}]
  assert check(found("red bell top left", "red bell top right"), clauses).correct
  verdict = check(found("red bell top left", "blue bell top right"), clauses)
  assert verdict.holds == {"object": True, "count": True, "color": False}


def test_another_object_stands_for_a_missing_one_only_if_the_number_is_right():
  clauses = [{"class": "bell", "count": 1, "color": "red", "place": "top left"}]
  alone = check(found("red key top left"), clauses)
  assert alone.holds == {"object": False, "count": True, "color": True, "place": True}
  # Blots everywhere must not count as one object in the right place.
  many = check(found("red key top left", "red key top right", "blue cat bottom left"), clauses)
  assert many.holds == {"object": False, "count": False, "color": False, "place": False}
  named = check(found("red bell top left", "red key top right"), clauses)
  assert named.holds == {"object": False, "count": False, "color": True, "place": True}

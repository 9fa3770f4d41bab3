"""Tests how captions with one wrong fact are made; `judge_test` tests the judge's verdicts."""

import numpy as np

from examples.scenes.judge import errors

RELATED = [
  {"class": "bell", "count": 1, "color": "red"},
  {"class": "key", "count": 1, "position": ["right of", 0]},
]


def test_one_fact_is_changed_at_a_time():
  facts = {"include": [*RELATED, {"class": "star", "count": 2, "place": "top left"}]}
  changed = errors.changed_facts(facts, np.random.default_rng(0))
  fields = {"object": "class", "color": "color", "count": "count", "place": "place"}
  assert set(changed) == {*fields, "relation"}
  for kind, other in changed.items():
    differing = [
      field
      for a, b in zip(facts["include"], other["include"])
      for field in a
      if a[field] != b[field]
    ]
    assert differing == [{**fields, "relation": "position"}[kind]]
  assert changed["relation"]["include"][1]["position"] == ["left of", 0]

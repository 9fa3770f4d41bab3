import pytest

from examples.scenes import source
from examples.scenes.judge.clauses import parse
from examples.scenes.options import RARE, ScenesConfig


def canonical(clauses):
  """Sorts clauses and replaces the index of a related object by its name."""
  found = []
  for clause in clauses:
    fields = {**clause}
    if "position" in clause:
      relation, reference = clause["position"]
      fields["position"] = (relation, clauses[reference]["class"])
    found.append(sorted(fields.items()))
  return sorted(found, key=str)


def test_a_caption_of_two_related_objects():
  assert parse("a red bell left of two keys") == [
    {"class": "bell", "count": 1, "color": "red", "position": ["left of", 1]},
    {"class": "key", "count": 2},
  ]


@pytest.mark.parametrize(
  ("split", "count"),
  [
    ("train", 500),
    ("heldout", 500),
    *(pytest.param(split, 3_000, marks=pytest.mark.slow) for split in ("train", "heldout")),
  ],
)
def test_every_caption_of_the_source_claims_what_its_facts_say(split, count):
  config = ScenesConfig(rare_objects=len(RARE), heldout=3_000, seed=5)
  for index in range(count):
    pair = source.pair(config, split, index)
    clauses = parse(pair.caption)
    assert clauses is not None, pair.caption
    assert canonical(clauses) == canonical(pair.facts["include"]), pair.caption


def test_parts_are_combined_freely():
  text = "There are 3 blue fish, at the top left stands a key, and under the bone we see glasses."
  assert parse(text) == [
    {"class": "fish", "count": 3, "color": "blue"},
    {"class": "key", "count": 1, "place": "top left"},
    {"class": "glasses", "count": 1, "position": ["below", 3]},
    {"class": "bone", "count": 1},
  ]


@pytest.mark.parametrize(
  "caption",
  [
    "",
    "an image of",
    "a red bell and a dragon",  # The object is unknown.
    "a crimson bell",
    "a big red bell",
    "no bell",
    "bells",  # The number is missing.
    "bell",
    "two bell",
    "a bells",
    "a bell in the middle",
    "a bell at the top",
    "a bell left of",
    "left of a key",
    "at the top left",
    "a bell at the top left at the top right",
    "a bell left of a key at the top left",  # The place is ambiguous.
    "a bell a key",
    "a bell is red",
  ],
)
def test_what_is_not_understood_claims_nothing(caption):
  assert parse(caption) is None

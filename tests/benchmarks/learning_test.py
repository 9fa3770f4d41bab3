import pytest

from benchmarks import learning, learning_table


def row(group, concept, half, right):
  facts = {"group": group, "concept": concept, "half": half, "right": right, "lookup": False}
  return {**facts, "seed": 1, "caption": ""}


def run_of(seed, rows):
  bits = {key: [1.0, 3.0] for key in learning_table.BITS}
  return {
    "condition": "today", "seed": seed, "rows": rows, "bits": bits, "concepts": ["a", "b"],
    "halves": ["choose", "report"],
  }  # fmt: skip


def every_group(half, right):
  groups = [group for group in learning_table.TITLES if group not in ("color named", "one object")]
  return [row(group, f"red {group} top left", half, right) for group in groups]


def test_halves_are_not_mixed_and_captions_of_one_object_are_counted_apart():
  rows = every_group("choose", True) + every_group("report", False)
  for half, first, second in (("choose", True, True), ("report", True, False)):
    rows.append(row("color named", "red bell top left", half, first))
    rows.append(row("color named", "blue key top left, red bell top right", half, second))
  table = learning_table.table([run_of(0, rows), run_of(1, rows)])
  means = {
    half: {n: v["mean"] for n, v in of["today"].items() if n != "seeds"}
    for half, of in table.items()
  }
  assert (means["choose"]["rare/right"], means["report"]["rare/right"]) == (1, 0)
  assert (means["choose"]["bits/own"], means["report"]["bits/own"]) == (1, 3)
  assert means["report"]["color named/right"] == pytest.approx(0.5)
  assert means["report"]["one object/right"] == 1
  assert table["report"]["today"]["one object/right"]["count"] == 2
  assert "today (2 seeds)" in learning_table.markdown(table)


def test_a_concept_belongs_to_one_half():
  halves = [learning.half_of(f"object {i}") for i in range(400)]
  assert halves == [learning.half_of(f"object {i}") for i in range(400)]
  assert 150 < halves.count("choose") < 250

import json

import numpy as np
import pytest

from examples.scenes.judge import table as scene_table
from examples.scenes.judge.baselines import Known
from examples.scenes.judge.facts import Found, SceneVerdict
from examples.scenes.judge.table import Judged


def judged(tag, heldout, correct, concept="", asked=1, shown=1, known=None, **holds):
  colored = {"color": "red"} if "color" in holds else {}
  facts = {
    "tag": tag,
    "heldout": heldout,
    "include": [{"class": "bell", "count": asked, **colored}],
    "exclude": [],
    "objects": [{"class": "bell", "color": "red", "place": "top left", "box": [0, 0, 1, 1]}],
  }
  thing = Found("bell", "red", "top left", 0.9, (3, 2, 21, 23))
  holds = {"object": True, "count": True, **holds}
  verdict = SceneVerdict(correct, "" if correct else "wrong", (thing,) * shown, holds)
  return Judged("a bell", facts, concept, verdict, known)


def some():
  return [
    judged("position", "scene", True, "a", place=True),
    judged("position", "pair", False, "b", place=False),
    judged("colors", "pair", False, "c", color=False, place=True),
    judged("single_object", "scene", True, "d", place=True),
    judged("single_object", "scene", True, "e", place=True),
    judged("single_object", "pair", False, "f", place=False),
  ]


def test_shares_are_over_the_captions_that_name_a_fact():
  table = scene_table.table(some(), num_resamples=200)
  assert table["all"]["images"] == 6
  shares = {name: table["all"][name]["share"] for name in ("correct", "place", "color")}
  assert shares == {"correct": 0.5, "place": pytest.approx(4 / 6), "color": 0}
  assert "lookup" not in table["all"]
  parts = {part: row["images"] for part, row in table["parts"].items()}
  assert parts == {"pair, color named": 1, "pair, no color named": 2}
  assert "color" not in table["tag"]["position"]
  assert list(table["tag"]) == ["single_object", "colors", "position"]  # The order of GenEval.
  assert {kind: row["images"] for kind, row in table["heldout"].items()} == {"scene": 3, "pair": 3}
  assert table["heldout"]["scene"]["correct"]["share"] == 1
  assert table["geneval"] == pytest.approx((0.5 + 0 + 2 / 3) / 3)


def test_a_lookup_stands_beside_the_model_and_new_claims_are_rows_of_their_own():
  old, drawn, new = Known(True, True, True), Known(False, False, True), Known(False, False, False)
  cases = [("scene", True, old), ("scene", True, drawn), ("scene", False, new), ("pair", True, new)]
  images = [judged("colors", kind, right, known=known) for kind, right, known in cases]
  table = scene_table.table(images, 200)
  assert table["all"]["lookup"]["share"] == 0.5
  assert table["heldout"]["scene"]["lookup"]["share"] == pytest.approx(2 / 3)
  parts = table["parts"]
  assert list(parts) == ["scene, new claims", "scene, claims of training", "pair, no color named"]
  assert parts["scene, new claims"]["images"] == 2
  assert parts["scene, new claims"]["correct"]["share"] == 0.5
  assert parts["scene, new claims"]["lookup"]["share"] == 0.5
  assert parts["scene, claims of training"]["lookup"]["share"] == 1


def test_a_gain_is_paired_by_caption():
  better, base = (
    [judged("colors", "scene", i < right, f"{i}") for i in range(40)] for right in (30, 20)
  )
  found = scene_table.gain(better, base, 500)
  assert found["share"] == 0.25
  assert found["groups"] == 40
  # The interval is paired; without pairing, it would be about [0.04, 0.46].
  assert 0.08 < found["low"] < 0.25 < found["high"] < 0.42
  assert scene_table.gain(base, better, 500)["share"] == -0.25
  same = scene_table.gain(base, base, 500)
  assert (same["low"], same["high"]) == (0, 0)


def test_intervals_resample_scenes_and_not_images():
  rng = np.random.default_rng(0)
  right = rng.random(40) < 0.5
  alone = [judged("colors", "scene", bool(x), f"{i}") for i, x in enumerate(right)]
  four_times = [one for one in alone for _ in range(4)]
  first, second = (scene_table.table(x, 500)["all"]["correct"] for x in (alone, four_times))
  assert second["groups"] == 40
  assert (first["low"], first["high"]) == (second["low"], second["high"])
  assert first["high"] - first["low"] > 0.2


def test_the_text_has_a_line_for_each_category_and_kind_of_heldout():
  text = scene_table.describe({"guidance 1": scene_table.table(some(), 200)})
  lines = text.split("\n")
  assert lines[0] == (
    "guidance 1: 6 images, mean of the categories 38.9% correct; "
    "0.0% show more objects than requested, 0.0% fewer"
  )
  columns = ["images", "correct", "lookup", "object", "color", "count", "place"]
  assert lines[1].split() == columns
  assert [line.split("  ")[0] for line in lines[2:]] == [
    "all", "single_object", "colors", "position", "held-out: scene", "held-out: pair",
    "held-out: pair, color named", "held-out: pair, no color named",
  ]  # fmt: skip
  assert lines[5].split()[:3] == ["position", "2", "50.0%"]
  assert " -" in lines[5]  # Captions of this category name no colors.


def summary_scores(lines):
  """Computes the numbers that GenEval's summary_scores.py prints, without pandas."""
  results = [json.loads(line) for line in lines]
  prompts, tags = {}, {}
  for result in results:
    prompts.setdefault(result["metadata"], []).append(result["correct"])
    tags.setdefault(result["tag"], []).append(result["correct"])
  tasks = {tag: sum(values) / len(values) for tag, values in tags.items()}
  return {
    "images": len(results),
    "prompts": len(prompts),
    "correct images": sum(r["correct"] for r in results) / len(results),
    "correct prompts": sum(map(any, prompts.values())) / len(prompts),
    "score": sum(tasks.values()) / len(tasks),
  }


def test_lines_of_results_have_genevals_layout_and_its_summary_agrees_with_the_table():
  images = some()
  lines = [
    json.dumps(scene_table.geneval_result(f"{i:05d}/samples/0000.png", one))
    for i, one in enumerate(images)
  ]
  first = json.loads(lines[1])
  assert list(first) == ["filename", "tag", "prompt", "correct", "reason", "metadata", "details"]
  assert first["correct"] is False
  assert first["reason"] == "wrong"
  assert json.loads(first["metadata"]) == {
    "tag": "position",
    "include": [{"class": "bell", "count": 1}],
    "exclude": [],
    "prompt": "a bell",
  }
  assert json.loads(first["details"]) == {"bell": [[3, 2, 21, 23, 0.9]]}
  table = scene_table.table(images, 200)
  assert summary_scores(lines) == {
    "images": 6,
    "prompts": 3,  # Images with equal metadata belong to one prompt, as in GenEval.
    "correct images": table["all"]["correct"]["share"],
    "correct prompts": pytest.approx(2 / 3),
    "score": pytest.approx(table["geneval"]),
  }

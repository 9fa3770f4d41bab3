import dataclasses

import pytest

from cm3leon_jax.files.json_files import read_json, read_json_lines
from examples.scenes.judge import grade_files as files
from examples.scenes.judge.grades import judge_images, judge_texts
from examples.scenes.options import ScenesConfig
from tests.examples.scenes.records import records as made
from tests.generation.run import SETTINGS

COUNT = 24


@pytest.fixture(scope="module")
def records():
  return {name: made(ScenesConfig(), name, "heldout", COUNT) for name in ("count", "recolor")}


def answers_of(records, name, right):
  """Returns judged answers to `records`; only the first `right` of them are correct."""
  if name == "count":
    texts = [r.texts["answer"] if i < right else "none" for i, r in enumerate(records[name])]
    found = judge_texts(records[name], texts)
  else:
    images = [
      r.images["after" if i < right else "before"] for i, r in enumerate(records["recolor"])
    ]
    found = judge_images(records["recolor"], images)
  given = None if name == "count" else records["recolor"][0].images["before"]
  return [dataclasses.replace(a, given=given, score=-i) for i, a in enumerate(found)]


def test_files_have_the_shares_and_examples_and_the_worst(records, tmp_path):
  answers = {
    name: {"before": answers_of(records, name, 6), "after": answers_of(records, name, 18)}
    for name in ("count", "recolor")
  }
  result = files.write(tmp_path / "grades", answers, SETTINGS)
  for name in answers:
    table = result["tasks"][name]
    assert table["before"]["right"]["share"] == 6 / COUNT
    assert table["after"]["right"]["share"] == 18 / COUNT
    assert table["after"]["right"]["low"] < 18 / COUNT < table["after"]["right"]["high"]
    assert result["gains"][name]["share"] == pytest.approx(12 / COUNT)
  assert result["means"] == {}  # A mean needs answers to all tasks of a kind.
  lines = read_json_lines(tmp_path / "grades" / files.ANSWERS)
  assert len(lines) == 2 * 2 * COUNT
  shown = {(line["task"], line["row"]): line for line in lines if line["column"] == "after"}
  examples = read_json(tmp_path / "grades" / files.GRADES)["examples"]
  for name, [(_, chosen), (_, worst)] in examples.items():
    assert len(chosen) == files.EXAMPLES
    assert 0 < len(worst) <= files.EXAMPLES
    assert not set(chosen) & set(worst)
    wrong = [shown[name, i] for i in worst]
    assert not any(line["right"] for line in wrong)
    assert [line["score"] for line in wrong] == sorted((x["score"] for x in wrong), reverse=True)
    for i in (*chosen, *worst):
      images = shown[name, i]["images"]
      assert all((tmp_path / "grades" / file).exists() for file in images.values())
      assert ("true" in images) == (name == "recolor")
  assert "18/24" not in files.describe(result)
  assert "75.0% [" in files.describe(result)

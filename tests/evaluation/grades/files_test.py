import dataclasses

import pytest

from cm3leon_jax.data.instructions.task_files import read_tasks
from cm3leon_jax.evaluation.grades import files
from cm3leon_jax.evaluation.grades.answers import heldout_records
from cm3leon_jax.files.json_files import read_json_lines
from cm3leon_jax.reports import instruction_section
from cm3leon_jax.scenes.interface import WORLD
from tests.generation.run import SETTINGS

TASKS = {task.name: task for task in read_tasks("scenes")}
COUNT = 24


@pytest.fixture(scope="module")
def records():
  return {
    name: heldout_records(task, SETTINGS, COUNT)
    for name, task in TASKS.items()
    if name in ("count", "recolor")
  }


def answers_of(records, name, right):
  """Returns judged answers to `records`; only the first `right` of them are correct."""
  if name == "count":
    texts = [r.texts["answer"] if i < right else "none" for i, r in enumerate(records[name])]
    found = WORLD.judge_answer_texts(records[name], texts)
  else:
    images = [
      r.images["after" if i < right else "before"] for i, r in enumerate(records["recolor"])
    ]
    found = WORLD.judge_answer_images(records["recolor"], images, SETTINGS)
  given = None if name == "count" else records["recolor"][0].images["before"]
  return [dataclasses.replace(a, given=given, score=-i) for i, a in enumerate(found)]


def test_files_have_the_shares_and_the_page_shows_examples_and_the_worst(records, tmp_path):
  answers = {
    name: {"before": answers_of(records, name, 6), "after": answers_of(records, name, 18)}
    for name in ("count", "recolor")
  }
  result = files.write(tmp_path / "grades", answers, SETTINGS, WORLD.kinds)
  for name in answers:
    table = result["tasks"][name]
    assert table["before"]["right"]["share"] == 6 / COUNT
    assert table["after"]["right"]["share"] == 18 / COUNT
    assert table["after"]["right"]["low"] < 18 / COUNT < table["after"]["right"]["high"]
    assert result["gains"][name]["share"] == pytest.approx(12 / COUNT)
  assert result["means"] == {}  # A mean needs answers to all tasks of a kind.
  lines = read_json_lines(tmp_path / "grades" / files.ANSWERS)
  assert len(lines) == 2 * 2 * COUNT
  shown = instruction_section.read(tmp_path, lambda path: path.exists() and str(path))
  assert shown["titles"] == ["before", "after"]
  assert [row["label"] for row in shown["rows"]] == ["count", "recolor", "recolor, kept"]
  for name, [(_, chosen), (_, worst)] in shown["examples"].items():
    assert len(chosen) == files.EXAMPLES
    assert 0 < len(worst) <= files.EXAMPLES
    assert not any(line["right"] for line in worst)
    assert [line["score"] for line in worst] == sorted((x["score"] for x in worst), reverse=True)
    assert not {line["row"] for line in chosen} & {line["row"] for line in worst}
    images = [line["images"] for line in [*chosen, *worst]]
    assert all(all(of.values()) for of in images)
    assert all(("true" in of) == (name == "recolor") for of in images)
  assert instruction_section.read(tmp_path / "grades", str) is None
  assert "18/24" not in files.describe(result)
  assert "75.0% [" in files.describe(result)

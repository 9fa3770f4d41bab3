"""Answers to instructions are asked for in the words of the task, judged, and put on the page."""

import dataclasses
import types

import pytest

from cm3leon_jax.data.instructions.config import InstructionsConfig
from cm3leon_jax.data.instructions.task_files import load_tasks, read_tasks
from cm3leon_jax.files.json_files import read_json_lines
from cm3leon_jax.reports import instruction_section
from cm3leon_jax.scenes.instructions import EDITS, QUESTIONS
from cm3leon_jax.scenes.judge import grade_files
from cm3leon_jax.scenes.judge import instruction_grades as grades
from tests.generation.run import SETTINGS

TASKS = {task.name: task for task in read_tasks("scenes")}
COUNT = 24


class TrueTokenizer:
  """Loses nothing."""

  config = types.SimpleNamespace(resolution=48)

  def encode(self, images):
    return images

  def decode(self, codes):
    return codes


@pytest.fixture(scope="module")
def records():
  return {
    name: grades.heldout_records(task, SETTINGS, COUNT)
    for name, task in TASKS.items()
    if name in ("count", "describe", "recolor", "draw")
  }


def test_what_needs_no_model(records):
  some = records["recolor"]
  found = grades.without_model(TASKS["recolor"], some, TrueTokenizer())
  shares = {title: grades.summarize(answers, 50, 0) for title, answers in found.items()}
  assert shares["tokenizer"]["right"]["share"] == shares["tokenizer"]["kept"]["share"] == 1
  assert shares["copy"]["right"]["share"] == 0  # An edit changes every scene.
  assert shares["copy"]["kept"]["share"] == 1
  found = grades.without_model(TASKS["count"], records["count"], TrueTokenizer())
  assert list(found) == ["majority", "any object"]
  assert grades.summarize(found["majority"], 50, 0)["right"]["share"] == 0.25
  assert grades.without_model(TASKS["describe"], records["describe"], TrueTokenizer()) == {}
  assert list(grades.without_model(TASKS["draw"], records["draw"], TrueTokenizer())) == [
    "tokenizer"
  ]


def answers_of(records, name, right):
  """Answers of which the first `right` are the true ones."""
  if name == "count":
    texts = [r.texts["answer"] if i < right else "none" for i, r in enumerate(records[name])]
    found = grades.judge_texts(records[name], texts)
  else:
    images = [
      r.images["after" if i < right else "before"] for i, r in enumerate(records["recolor"])
    ]
    found = grades.judge_images(records["recolor"], images)
  given = None if name == "count" else records["recolor"][0].images["before"]
  return [dataclasses.replace(a, given=given, score=-i) for i, a in enumerate(found)]


def test_files_have_the_shares_and_the_page_shows_examples_and_the_worst(records, tmp_path):
  answers = {
    name: {"before": answers_of(records, name, 6), "after": answers_of(records, name, 18)}
    for name in ("count", "recolor")
  }
  result = grade_files.write(tmp_path / "grades", answers, SETTINGS)
  for name in answers:
    table = result["tasks"][name]
    assert table["before"]["right"]["share"] == 6 / COUNT
    assert table["after"]["right"]["share"] == 18 / COUNT
    assert table["after"]["right"]["low"] < 18 / COUNT < table["after"]["right"]["high"]
    assert result["gains"][name]["share"] == pytest.approx(12 / COUNT)
  assert result["means"] == {}  # Not all questions and edits were asked.
  lines = read_json_lines(tmp_path / "grades" / grade_files.ANSWERS)
  assert len(lines) == 2 * 2 * COUNT
  shown = instruction_section.read(tmp_path, lambda path: path.exists() and str(path))
  assert shown["titles"] == ["before", "after"]
  assert [row["label"] for row in shown["rows"]] == ["count", "recolor", "recolor, kept"]
  for name, [(_, chosen), (_, worst)] in shown["examples"].items():
    assert len(chosen) == grade_files.EXAMPLES
    assert 0 < len(worst) <= grade_files.EXAMPLES
    assert not any(line["right"] for line in worst)
    assert [line["score"] for line in worst] == sorted((x["score"] for x in worst), reverse=True)
    assert not {line["row"] for line in chosen} & {line["row"] for line in worst}
    images = [line["images"] for line in [*chosen, *worst]]
    assert all(all(of.values()) for of in images)
    assert all(("true" in of) == (name == "recolor") for of in images)
  assert instruction_section.read(tmp_path / "grades", str) is None
  assert "18/24" not in grade_files.describe(result)
  assert "75.0% [" in grade_files.describe(result)


def test_means_are_over_all_questions_and_all_edits():
  table = {"answers": 2, "right": {"share": 0.5}, "kept": {"share": 0.75}}
  tables = {name: {"after": table, "before": table} for name in (*QUESTIONS, *EDITS)}
  tables["count"] = {"after": {"answers": 2, "right": {"share": 1.0}}, "majority": table}
  found = grades.means(tables)
  assert found["questions"] == {"after": 0.625}
  assert found["edits"] == {"after": 0.5, "before": 0.5}
  assert found["edits, kept"] == {"after": 0.75, "before": 0.75}


def test_every_task_of_scenes_is_judged_and_others_are_not():
  assert all(map(grades.is_judged, load_tasks(InstructionsConfig(tasks="scenes"))))
  fields = {"templates": ("{caption} <break> {image}",), "target": "image", "name": "x"}
  other = dataclasses.replace(TASKS["draw"], format="coco_2017", **fields)
  assert not grades.is_judged(other)

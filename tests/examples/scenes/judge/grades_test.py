import dataclasses
import types

import numpy as np
import pytest

from examples.scenes.instructions import EDITS, QUESTIONS
from examples.scenes.judge import grades as answers
from tests.examples.scenes.records import TASKS, write_tasks
from tests.generation.run import SETTINGS

COUNT = 24
NAMES = ("count", "describe", "recolor", "draw")


class TrueTokenizer:
  config = types.SimpleNamespace(resolution=48)

  def encode(self, images):
    return images

  def decode(self, codes):
    return codes


@pytest.fixture(scope="module")
def records(tmp_path_factory):
  root = tmp_path_factory.mktemp("tasks")
  tasks = write_tasks(root, NAMES, 1, COUNT)
  instructions = dataclasses.replace(SETTINGS.instructions, root=str(root))
  settings = dataclasses.replace(SETTINGS, instructions=instructions)
  return {task.name: answers.heldout_records(task, settings, COUNT) for task in tasks}


def without_model(task, records):
  return answers.without_model(task, records, TrueTokenizer())


def test_what_needs_no_model(records):
  some = records["recolor"]
  found = without_model(TASKS["recolor"], some)
  shares = {title: answers.summarize(some, 50, 0) for title, some in found.items()}
  assert shares["tokenizer"]["right"]["share"] == shares["tokenizer"]["kept"]["share"] == 1
  # A copied scene is never correct, because every edit changes the scene.
  assert shares["copy"]["right"]["share"] == 0
  assert shares["copy"]["kept"]["share"] == 1
  found = without_model(TASKS["count"], records["count"])
  assert list(found) == ["majority", "any object"]
  assert answers.summarize(found["majority"], 50, 0)["right"]["share"] == 0.25
  assert without_model(TASKS["describe"], records["describe"]) == {}
  assert list(without_model(TASKS["draw"], records["draw"])) == ["tokenizer"]


class Negative(TrueTokenizer):
  def decode(self, codes):
    return 255 - codes


def test_only_input_images_are_redrawn(records):
  for name in ("count", "recolor"):
    found = answers.redrawn(TASKS[name], records[name], Negative())
    assert len(found) == COUNT
    for one, other in zip(found, records[name]):
      for field, image in one.images.items():
        changed = field != TASKS[name].target
        np.testing.assert_array_equal(
          image, 255 - other.images[field] if changed else other.images[field]
        )
      assert one == dataclasses.replace(other, images=one.images)
  assert answers.redrawn(TASKS["draw"], records["draw"], Negative()) == []


def test_means_are_over_all_questions_and_all_edits():
  table = {"answers": 2, "right": {"share": 0.5}, "kept": {"share": 0.75}}
  tables = {name: {"after": table, "before": table} for name in (*QUESTIONS, *EDITS)}
  tables["count"] = {"after": {"answers": 2, "right": {"share": 1.0}}, "majority": table}
  assert answers.means(tables) == {
    "questions": {"after": 0.625},
    "edits": {"after": 0.5, "before": 0.5},
    "edits, kept": {"after": 0.75, "before": 0.75},
  }
  del tables["color"]  # A kind of which a task was not asked has no mean.
  assert set(answers.means(tables)) == {"edits", "edits, kept"}

"""Tasks of a config, and what is wrong in one of them, by its place and field."""

import dataclasses
import json

import pytest

from cm3leon_jax.config import UserError
from cm3leon_jax.data.instructions.task_files import load_tasks
from cm3leon_jax.settings import default_config, settings_from_config, settings_from_stored

DRAW = {
  "name": "draw",
  "format": "coco_2017",
  "target": "image",
  "templates": ["{caption} <break> {image}"],
}


def settings_with(**fields):
  config = default_config()
  config.instructions.update(fields)
  return settings_from_config(config)


def test_own_tasks_of_a_python_config():
  fields = {"own_tasks": ({**DRAW, "maps": {"edges": "canny"}, "weight": 2.0},)}
  settings = settings_with(**fields, root="data")
  (task,) = load_tasks(settings.instructions)
  assert (task.name, task.templates) == ("draw", ("{caption} <break> {image}",))
  assert (task.maps, task.weight, task.train) == ({"edges": "canny"}, 2.0, "train")
  assert settings.instructions.any
  assert not settings_with().instructions.any


def test_settings_with_own_tasks_are_stored_and_read_again():
  settings = settings_with(own_tasks=(DRAW,))
  stored = json.loads(json.dumps(dataclasses.asdict(settings)))  # As train/config.json.
  assert settings_from_stored(stored) == settings


@pytest.mark.parametrize(
  ("own", "sentence"),
  [
    (3, "it is 3; it must be a tuple of tasks, each a dict of its fields."),
    ("draw", "it is 'draw'; it must be a tuple of tasks, each a dict of its fields."),
    ((DRAW, 3), "task 2: a task must have fields by their names, the first of which is "),
    (({**DRAW, "wieght": 2.0},), "task 1: the task has no field 'wieght': did you mean 'weight'?"),
    (({**DRAW, "records": 8.5},), "task 1: records is 8.5; it must be a valid integer."),
    (({**DRAW, "target": "imgae"},), "task 1: target: the template '{caption} <break> {image}' "),
  ],
)  # fmt: skip
def test_a_wrong_own_task_is_named_by_its_place(own, sentence):
  values = default_config().to_dict()
  values["instructions"]["own_tasks"] = own
  with pytest.raises(UserError) as error:
    settings_from_config(values)
  assert str(error.value).startswith(f"config.instructions.own_tasks: {sentence}")

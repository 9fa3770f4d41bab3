import dataclasses
import json

import pytest

from cm3leon_jax.config.settings import default_config, settings_from_config, settings_from_stored
from cm3leon_jax.data.instructions.task_files import load_tasks
from cm3leon_jax.errors import FieldError
from tests.refusals import refused

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
  stored = json.loads(json.dumps(dataclasses.asdict(settings)))  # As in train/config.json.
  assert settings_from_stored(stored) == settings


@pytest.mark.parametrize(
  "own", ["draw", ({**DRAW, "wieght": 2.0},), ({**DRAW, "target": "imgae"},)]
)
def test_a_wrong_own_task_is_named_by_its_place(own):
  values = default_config().to_dict()
  values["instructions"]["own_tasks"] = own
  with refused(FieldError, path=("own_tasks",)):
    settings_from_config(values)

import dataclasses

import pytest

from cm3leon_jax import worlds
from cm3leon_jax.data.instructions.config import InstructionsConfig
from cm3leon_jax.data.instructions.task_files import load_tasks, read_tasks
from cm3leon_jax.evaluation import world as world_lib
from cm3leon_jax.scenes.interface import WORLD
from tests.generation.run import SETTINGS


def of_source(source):
  return dataclasses.replace(SETTINGS, raw=dataclasses.replace(SETTINGS.raw, source=source))


@pytest.mark.parametrize("name", worlds.MODULES)
def test_a_world_has_the_name_of_the_table(name):
  world = world_lib.find(name)
  assert world.name == name
  assert world.source(SETTINGS).name == name
  assert world_lib.of_source(of_source(name)) is world


def test_records_of_other_sources_with_facts_are_judged_by_the_first_world():
  """A folder of images with facts is no world, so the first world judges its records."""
  own = of_source("folder/of/own")
  assert world_lib.of_source(own) is None
  assert world_lib.of_facts(own) is world_lib.of_facts(of_source("scenes")) is WORLD


def test_every_task_of_scenes_is_judged_and_others_are_not():
  for task in load_tasks(InstructionsConfig(tasks="scenes")):
    assert world_lib.of_answers(task) is WORLD
  [task] = [task for task in read_tasks("scenes") if task.name == "draw"]
  fields = {"templates": ("{caption} <break> {image}",), "target": "image", "name": "x"}
  assert world_lib.of_answers(dataclasses.replace(task, format="coco_2017", **fields)) is None
  assert world_lib.of_answers(dataclasses.replace(task, heldout="")) is None

import dataclasses

import pytest

from cm3leon_jax.errors import UserError
from cm3leon_jax.reinforcement.prompts import Prompt, digest, read_heldout, read_prompts
from tests.refusals import refused
from tests.reinforcement.conftest import settings_of


def test_prompts_are_training_records_of_the_tasks_in_turns(layout):
  prompts = read_prompts(settings_of(), layout, 5)
  assert [prompt.task.name for prompt in prompts] == ["draw", "recolor", "draw", "recolor", "draw"]
  assert len({prompt.record.key for prompt in prompts}) == 5
  heldout = read_heldout(settings_of(), layout, 5)
  assert [prompt.task.name for prompt in heldout] == [prompt.task.name for prompt in prompts]
  assert not {p.record.key for p in prompts} & {p.record.key for p in heldout}


def captions(prompts):
  return [prompt.record.texts["caption"] for prompt in prompts]


def test_no_heldout_prompt_equals_another_or_a_known_prompt(layout):
  """Records of both splits have captions such as "a bell", although their images differ."""
  settings = settings_of(tasks=("draw",))
  first = captions(read_heldout(settings, layout, 24))
  assert len(set(first)) == 24
  known = [
    prompt._replace(record=dataclasses.replace(prompt.record, texts={"caption": caption}))
    for prompt, caption in zip(read_prompts(settings, layout, 12), first)
  ]
  others = captions(read_heldout(settings, layout, 12, known))
  assert others == first[12:]


def test_another_input_image_makes_another_prompt(layout):
  """Two edits with the same instruction, of different images."""
  first, second = read_prompts(settings_of(tasks=("recolor",)), layout, 2)
  texts = dataclasses.replace(second.record, texts=first.record.texts, key=first.record.key)
  same = dataclasses.replace(texts, images=dict(first.record.images))
  assert digest(Prompt(first.task, texts)) != digest(first)
  assert digest(Prompt(first.task, same)) == digest(first)


def test_only_known_heldout_prompts_are_refused(layout):
  settings = settings_of(tasks=("draw",))
  known = read_heldout(settings, layout, 20)
  with refused(UserError, "'draw'", "training records"):
    read_heldout(settings, layout, 1, known)


def test_records_that_are_too_long_are_left_out(layout):
  short = dataclasses.replace(layout, positions=60)
  settings = settings_of(tasks=("draw",))
  prompts = read_prompts(settings, short, 20)
  assert 0 < len(prompts) < len(read_prompts(settings, layout, 20))
  none = dataclasses.replace(layout, positions=20)
  for read in (read_prompts, read_heldout):
    with refused(UserError, "'draw'", "20 positions"):
      read(settings, none, 20)


@pytest.mark.parametrize("tasks", [("drow",), ("count",)])
def test_a_task_without_images_is_refused(layout, tasks):
  with refused(UserError, "config.reinforce.tasks", f"'{tasks[0]}'"):
    read_prompts(settings_of(tasks=tasks), layout, 4)

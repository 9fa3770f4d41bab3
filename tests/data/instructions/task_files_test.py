"""Tasks from YAML files, and what is wrong in one of them, by file, line and field."""

import re

import pytest

from cm3leon_jax.config import UserError
from cm3leon_jax.data.instructions.config import InstructionsConfig, fields_of
from cm3leon_jax.data.instructions.task_files import load_tasks, parse_tasks
from cm3leon_jax.settings import default_config, settings_from_config

DRAW = {
  "name": "draw",
  "format": "coco_2017",
  "target": "image",
  "templates": ["{caption} <break> {image}"],
}
FIRST = """\
- name: first
  format: jsonl
  target: answer
  templates: ["{question} {answer}"]
"""


def settings_with(**fields):
  config = default_config()
  config.instructions.update(fields)
  return settings_from_config(config)


def test_tasks_of_a_file_and_own_ones_together(tmp_path):
  path = tmp_path / "tasks.yaml"
  path.write_text(FIRST)
  settings = settings_with(tasks=str(path), own_tasks=(DRAW,))
  assert [task.name for task in load_tasks(settings.instructions)] == ["first", "draw"]
  with pytest.raises(
    UserError, match=r"instructions has two tasks of the name 'first': rename one"
  ):
    load_tasks(settings_with(tasks=str(path), own_tasks=({**DRAW, "name": "first"},)).instructions)


def test_only_some_tasks_may_be_trained():
  config = InstructionsConfig(tasks="scenes", only=("count", "draw"))
  assert [task.name for task in load_tasks(config)] == ["draw", "count"]  # In the table's order.
  with pytest.raises(UserError, match="only names 'cuont'; the tasks are draw, "):
    load_tasks(InstructionsConfig(tasks="scenes", only=("cuont",)))


def test_a_file_that_is_not_there_is_named_with_the_tables_of_the_package(tmp_path):
  message = "config.instructions.tasks is '{}'; it must be a YAML file that exists, or one of "
  for name in (str(tmp_path / "no.yaml"), str(tmp_path), "scense"):
    with pytest.raises(UserError, match=re.escape(message.format(name) + "cm3leon, scenes, ")):
      load_tasks(InstructionsConfig(tasks=name))
  path = tmp_path / "latin.yaml"
  path.write_bytes(b"- name: \xe9\n")
  with pytest.raises(UserError, match=r"latin\.yaml is not UTF-8 text"):
    load_tasks(InstructionsConfig(tasks=str(path)))


def second(**lines):
  """A second task, with other lines in place of some: its name is in line 5, its target in 7."""
  fields = {
    "name": "second",
    "format": "vqa_v2",
    "target": "answer",
    "templates": '["{question} {answer} <break> {image}"]',
    "train": "train",
    **lines,
  }
  text = "\n".join(f"  {name}: {value}" for name, value in fields.items() if value is not None)
  return f"{FIRST}-{text[1:]}\n"


@pytest.mark.parametrize(
  ("text", "sentence"),
  [
    (second(wieght=2.0), "line 10: the task has no field 'wieght': did you mean 'weight'?"),
    (second(records=8.5), "line 10: records is 8.5; it must be a valid integer."),
    (second(weight=-1), "line 10: weight is -1; it must be at least 0."),
    (second(name="My task"), "line 5: name is 'My task'; it must match pattern"),
    (second(name="first"), "line 5: the task of line 1 has the name 'first', too: rename one."),
    (second(format=None), "line 5: the task has no field 'format', which it needs."),
    (second(format="vqa_v3"), "line 6: format is 'vqa_v3'; it must be one of scenes/TASK, "),
    (second(train="dev"), "line 9: train is 'dev'; format 'vqa_v2' has the splits train, val."),
    (second(heldout="test"), "line 10: heldout is 'test'; format 'vqa_v2' has the splits train, "),
    (second(heldout="train"), "line 10: heldout is 'train', which is trained on: name another."),
    (second(target="anwser"), "line 7: target: the template '{question} {answer} <break> {image}' "
     "must have {anwser}, the target, once; it has it 0 times."),
    (second(templates='"{answer}"'), "line 8: templates is '{answer}'; it must be a list."),
    (second(templates="[]"), "line 8: templates is (); it must have at least 1 item"),
    (second(templates='\n  - "{answer}"\n  - "{answer} {context}"'), "line 10: the template "
     "'{answer} {context}' has the field {context}; records of format 'vqa_v2' have question, "
     "answer, image."),
    (second(templates='\n  - "{answer}"\n  - 7'), "line 10: templates.1 is 7; it must be a valid "),
    (second(templates='["{answer} {image}"]'), "line 8: the template '{answer} {image}' has the "
     "image {image} in a text: put <break> between them."),
    (second(templates='["{question?} {answer}"]'), "line 8: templates: the template '{question?} "
     "{answer}' has an optional field beside another one: give it a line of its own."),
    (second(templates='["{answer} <break>"]'), "line 8: templates: the template '{answer} <break>' "
     "has an empty segment beside a <break>."),
    (second(maps="{edges: canny}"), "line 10: maps need an image as the target, and that is "),
    (second(target="image", maps="\n    edges: canny\n    question: hed"), "line 12: maps has "
     "'question', a field of the records: rename it."),
    (second(maps="{edges: 3}"), "line 10: maps.edges is 3; it must be a valid string."),
    (second(drop_instruction=0.7, drop_all=0.7), "line 11: drop_all: drop_instruction and "),
    (FIRST + "  name: again\n", "line 5: the task has the field 'name' twice: leave one out, or "),
    (FIRST + "- 7\n", "line 5: a task must have fields by their names, the first of which is "),
    (FIRST + "- 7: 8\n", "line 5: a task must have fields by their names, the first of which is "),
    (FIRST + "- name: [\n", "line 6, is not valid YAML (expected the node content"),
    (FIRST + "---\n" + FIRST, "line 6: another document begins; a file of tasks has one."),
    (FIRST + "- !!python/name:os.system {}\n", "line 5, is not valid YAML (could not determine a "),
    (second(format="scenes/draw", train="val", records=5),
     "line 9: train is 'val'; format 'scenes/draw' has the splits train, heldout."),
    (second(format="scenes/draw"), "line 5: records is 0; scenes are drawn without end: set a "),
    (second(format="scenes/draw", records=5, heldout="heldout", heldout_records=0),
     "line 12: heldout_records is 0; scenes are drawn without end: set a number."),
  ],
)  # fmt: skip
def test_a_mistake_in_a_file_is_named_by_the_line_of_its_field(text, sentence):
  with pytest.raises(UserError) as error:
    parse_tasks(text, "my.yaml")
  assert str(error.value).startswith(f"my.yaml, {sentence}")
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "first", "name: first", "[]"])
def test_a_file_must_be_a_list(text):
  with pytest.raises(UserError, match=r"^my.yaml must be a list of tasks, each `- name: \.\.\.`"):
    parse_tasks(text, "my.yaml")


def test_fields_of_one_task_may_be_those_of_another():
  text = "- &base\n" + FIRST.replace("- ", "  ") + "- <<: *base\n  name: second\n  weight: 3\n"
  first, other = parse_tasks(text, "my.yaml")
  assert (first.name, other.name, other.weight) == ("first", "second", 3.0)
  assert first.templates == other.templates


def test_texts_of_a_general_file_are_not_known_before_it_is_read():
  (task,) = parse_tasks(FIRST.replace("{question}", "{anything} <break> {at} <break>"), "my.yaml")
  assert fields_of(task.templates[0]) == ["anything", "at", "answer"]

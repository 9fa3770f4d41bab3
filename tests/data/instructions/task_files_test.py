import pytest

from cm3leon_jax.config.instructions import InstructionsConfig, fields_of
from cm3leon_jax.data.instructions.task_files import load_tasks, parse_tasks
from cm3leon_jax.errors import UserError
from examples.scenes.make_instructions import TEMPLATES
from tests.config.instructions_test import DRAW, settings_with
from tests.refusals import refused

SCENES = str(TEMPLATES)

FIRST = """\
- name: first
  format: jsonl
  target: answer
  templates: ["{question} {answer}"]
"""


def test_tasks_of_a_file_and_own_ones_together(tmp_path):
  path = tmp_path / "tasks.yaml"
  path.write_text(FIRST)
  settings = settings_with(tasks=str(path), own_tasks=(DRAW,))
  assert [task.name for task in load_tasks(settings.instructions)] == ["first", "draw"]
  with refused(UserError, "'first'"):
    load_tasks(settings_with(tasks=str(path), own_tasks=({**DRAW, "name": "first"},)).instructions)


def test_only_some_tasks_may_be_trained():
  config = InstructionsConfig(tasks=SCENES, only=("count", "draw"))
  assert [task.name for task in load_tasks(config)] == ["draw", "count"]  # In the file's order.
  with refused(UserError, "cuont", "count"):
    load_tasks(InstructionsConfig(tasks=SCENES, only=("cuont",)))


def test_a_file_that_is_not_there_is_named_with_the_tables_of_the_package(tmp_path):
  for name in (str(tmp_path / "no.yaml"), str(tmp_path), "scense"):
    with refused(UserError, name, "tutorial"):
      load_tasks(InstructionsConfig(tasks=name))


def second(**lines):
  """Returns the YAML of a second task. Line 5 has the task's name, line 7 its target."""
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
  ("text", "line", "fact"),
  [
    (second(wieght=2.0), 10, "wieght"),
    (second(records=8.5), 10, "records"),
    (second(name="first"), 5, "'first'"),
    (second(format=None), 5, "format"),
    (second(format="vqa_v3"), 6, "vqa_v3"),
    (second(train="dev"), 9, "train is 'dev'"),
    (second(heldout="train"), 10, "heldout"),
    (second(target="anwser"), 7, "anwser"),
    (second(templates="[]"), 8, "templates"),
    (second(templates='["{ question } {answer}"]'), 8, "brace"),
    (second(templates='["{answer} {answer}"]'), 7, "2 times"),
    (second(templates='["{question?} {answer}"]'), 8, "optional"),
    (second(templates='["{answer} <break>"]'), 8, "empty segment"),
    (second(drop_instruction=0.7, drop_all=0.7), 11, "drop_all"),
    (FIRST + "  name: again\n", 5, "'name' twice"),
    (FIRST + "- 7\n", 5, "mapping"),
    (FIRST + "---\n" + FIRST, 6, "second YAML document"),
    (FIRST + "- name: [\n", 6, "not valid YAML"),
  ],
)  # fmt: skip
def test_a_mistake_in_a_file_is_named_by_the_line_of_its_field(text, line, fact):
  with refused(UserError, "my.yaml", f"line {line or ''}", fact):
    parse_tasks(text, "my.yaml")


@pytest.mark.parametrize("text", ["", "first", "name: first", "[]"])
def test_a_file_must_be_a_list(text):
  with refused(UserError, "my.yaml", "list of tasks"):
    parse_tasks(text, "my.yaml")


def test_fields_of_one_task_may_be_those_of_another():
  text = "- &base\n" + FIRST.replace("- ", "  ") + "- <<: *base\n  name: second\n  weight: 3\n"
  first, other = parse_tasks(text, "my.yaml")
  assert (first.name, other.name, other.weight) == ("first", "second", 3.0)
  assert first.templates == other.templates


def test_texts_of_a_general_file_are_not_known_before_it_is_read():
  (task,) = parse_tasks(FIRST.replace("{question}", "{anything} <break> {at} <break>"), "my.yaml")
  assert fields_of(task.templates[0]) == ["anything", "at", "answer"]

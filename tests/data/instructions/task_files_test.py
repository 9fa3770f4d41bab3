import pytest

from cm3leon_jax.config import UserError
from cm3leon_jax.data.instructions.config import InstructionsConfig, fields_of
from cm3leon_jax.data.instructions.task_files import load_tasks, parse_tasks
from tests.data.instructions.config_test import DRAW, settings_with
from tests.refusals import refused

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
  with refused(UserError):
    load_tasks(settings_with(tasks=str(path), own_tasks=({**DRAW, "name": "first"},)).instructions)


def test_only_some_tasks_may_be_trained():
  config = InstructionsConfig(tasks="scenes", only=("count", "draw"))
  assert [task.name for task in load_tasks(config)] == ["draw", "count"]  # In the file's order.
  with refused(UserError):
    load_tasks(InstructionsConfig(tasks="scenes", only=("cuont",)))


def test_a_file_that_is_not_there_is_named_with_the_tables_of_the_package(tmp_path):
  for name in (str(tmp_path / "no.yaml"), str(tmp_path), "scense"):
    with refused(UserError):
      load_tasks(InstructionsConfig(tasks=name))
  path = tmp_path / "latin.yaml"
  path.write_bytes(b"- name: \xe9\n")
  with refused(UserError):
    load_tasks(InstructionsConfig(tasks=str(path)))


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
  "text",
  [
    second(wieght=2.0),
    second(records=8.5),
    second(weight=-1),
    second(name="My task"),
    second(name="first"),
    second(format=None),
    second(format="vqa_v3"),
    second(train="dev"),
    second(heldout="test"),
    second(heldout="train"),
    second(target="anwser"),
    second(templates='"{answer}"'),
    second(templates="[]"),
    second(templates='\n  - "{answer}"\n  - "{answer} {context}"'),
    second(templates='\n  - "{answer}"\n  - 7'),
    second(templates='["{answer} {image}"]'),
    second(templates='["{question?} {answer}"]'),
    second(templates='["{answer} <break>"]'),
    second(maps="{edges: canny}"),
    second(target="image", maps="\n    edges: canny\n    question: hed"),
    second(maps="{edges: 3}"),
    second(drop_instruction=0.7, drop_all=0.7),
    FIRST + "  name: again\n",
    FIRST + "- 7\n",
    FIRST + "- 7: 8\n",
    FIRST + "- name: [\n",
    FIRST + "---\n" + FIRST,
    FIRST + "- !!python/name:os.system {}\n",
    second(format="scenes/draw", train="val", records=5),
    second(format="scenes/draw"),
    second(format="scenes/draw", records=5, heldout="heldout", heldout_records=0),
  ],
)  # fmt: skip
def test_a_mistake_in_a_file_is_named_by_the_line_of_its_field(text):
  with refused(UserError) as error:
    parse_tasks(text, "my.yaml")
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "first", "name: first", "[]"])
def test_a_file_must_be_a_list(text):
  with refused(UserError):
    parse_tasks(text, "my.yaml")


def test_fields_of_one_task_may_be_those_of_another():
  text = "- &base\n" + FIRST.replace("- ", "  ") + "- <<: *base\n  name: second\n  weight: 3\n"
  first, other = parse_tasks(text, "my.yaml")
  assert (first.name, other.name, other.weight) == ("first", "second", 3.0)
  assert first.templates == other.templates


def test_texts_of_a_general_file_are_not_known_before_it_is_read():
  (task,) = parse_tasks(FIRST.replace("{question}", "{anything} <break> {at} <break>"), "my.yaml")
  assert fields_of(task.templates[0]) == ["anything", "at", "answer"]

import pathlib
import re

import pytest
import yaml

from cm3leon_jax.config.instructions import make_task
from cm3leon_jax.data.instructions.task_files import parse_tasks, read_tasks, shipped
from cm3leon_jax.data.instructions.tasks import choose_template
from tools import tasks_page

PAGE = tasks_page.page()
GUIDE = (pathlib.Path(__file__).parents[1] / "docs" / "tuning.md").read_text(encoding="utf-8")
TASKS = [(name, task) for name in shipped() for task in read_tasks(name)]


def named(table, name):
  (task,) = [task for task in read_tasks(table) if task.name == name]
  return task


@pytest.mark.parametrize(
  ("table", "task"), TASKS, ids=lambda x: x if isinstance(x, str) else x.name
)
def test_every_shipped_task_has_an_example(table, task):
  record = tasks_page.example(task)
  assert choose_template(task, record.key) == task.templates[0]
  shown = tasks_page.sample_of(task, record)
  assert f"\n**`{task.name}`** predicts `{task.target}`" in PAGE.partition(f"`{table}`\n")[2]
  assert f"```\n{shown}\n```" in PAGE
  assert shown.startswith("</s> ")
  if task.target in record.texts:  # The answer occurs only after the sentinel.
    answer = " ".join(record.texts[task.target].split())
    assert shown.endswith(f"</s> <mask:0> {answer} <eoss>")
    assert shown.count("<mask:0>") == 2
  else:
    assert shown.endswith("<break> [image] </s>")
  given = [x for x in record.images if x != task.target and f"{{{x}}}" in task.templates[0]]
  assert shown.count("[image]") == len(given) + 1 - (task.target in record.texts)


def test_templates_of_the_paper():
  questions = {
    "Question: {question} Answer: {answer}. <break> {image}",
    "Question: {question}\n{answer} <break> {image}",
    "Question: {question} The answer is {answer}. <break> {image}",
  }
  for name in ("vqa", "vizwiz", "ok_vqa", "textvqa"):
    assert set(named("cm3leon", name).templates) == questions
  end = "{caption} <break> {image}"
  for name in ("caption_coco", "caption_flickr30k"):
    assert set(named("cm3leon", name).templates) == {end, f"Describe the given picture. {end}"}
  detail, long = "Describe the given picture in very detail.", "Generate a long"
  for name, second in (
    ("paragraph", "Describe all the objects in the given image in very detail."),
    ("narrative_coco", f"{long} narration of what is happening in the given image."),
    ("narrative_flickr30k", f"{long} narration of what is happening in the given image."),
  ):
    starts = (detail, second, f"{long} caption for the given image.")
    assert set(named("cm3leon", name).templates) == {f"{start} {end}" for start in starts}
  for name, given in {
    "canny": "canny edge features",
    "segmentation": "a segmentation map",
    "hed": "hed features",
    "pose": "openpose features",
    "depth": "depth features",
    "normals": "3D norm features",
    "scribble": "children's scribbles",
  }.items():
    (template,) = named("cm3leon", name).templates
    start, _, rest = template.partition(" <break> ")
    assert start == f"Make high quality image from {given}"
    assert rest.endswith(f"}} <break> {end}")


def test_a_line_break_before_the_answer_is_read():
  task, record = named("cm3leon", "vqa"), tasks_page.example(named("cm3leon", "vqa"))
  (one,) = [t for t in task.templates if "\n" in t]
  only = make_task({"name": "x", "format": "vqa_v2", "target": "answer", "templates": [one]})
  assert tasks_page.sample_of(only, record) == (
    "</s> Question: What is the man holding?\n<mask:0> <break> [image] </s> <mask:0> an umbrella "
    "<eoss>"
  )


def test_own_tasks_of_the_page_are_right():
  (text,) = re.findall(r"```yaml\n(.*?)```", GUIDE, re.DOTALL)
  assert [task.name for task in parse_tasks(text, "page")] == ["poem"]
  python = re.search(r"own_tasks = (\(.*?\n\))\n", GUIDE, re.DOTALL)[1]
  (values,) = yaml.safe_load(re.sub(r"^\(|,\n\)$", "", python).join("[]"))
  assert make_task(values).maps == {"lines": "scribble"}

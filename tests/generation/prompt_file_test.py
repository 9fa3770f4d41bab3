"""Tests tasks from flags and files: a mistake is reported in one sentence, with its place."""

import json
import pathlib
import re

import pytest

from cm3leon_jax.config import UserError
from cm3leon_jax.decoding.config import SamplingConfig
from cm3leon_jax.generation.image_tasks import TextToImage
from cm3leon_jax.generation.prompt_file import TASKS, make_task, pair, read


def test_a_class_with_a_name_is_a_task_and_stands_on_the_page():
  page = (pathlib.Path(__file__).parents[2] / "docs" / "generating.md").read_text()
  table = page.partition("## Tasks\n")[2].partition("\n\n")[0]
  named = re.findall(r"^\| `(\w+)` ", table, re.MULTILINE)
  assert set(named) == {cls.name for cls in TASKS}
  assert len(TASKS) == len(named) == 9


@pytest.mark.parametrize(
  ("fields", "sentence"),
  [
    (
      {"task": "paint"},
      "task is 'paint'; it must be one of text_to_image, infill_image, edit, instruct, ",
    ),
    ({"task": "text_to_image"}, "task text_to_image needs a prompt, and none is given."),
    (
      {"task": "text_to_image", "prompt": " "},
      "task text_to_image needs a prompt, and none is given.",
    ),
    ({"task": "caption"}, "task caption needs an image, and none is given."),
    ({"task": "question", "prompt": "what"}, "task question needs an image, and none is given."),
    ({"task": "edit", "image": "a.png"}, "task edit needs a prompt, and none is given."),
    (
      {"task": "caption", "image": "a.png", "prompt": "cat"},
      "task caption takes no prompt: leave 'cat' out, or name a task that takes a prompt.",
    ),
    (
      {"task": "text_to_image", "prompt": "cat", "image": "a.png"},
      "task text_to_image takes no image: leave 'a.png' out",
    ),
    (
      {"task": "unconditional", "prompt": "cat"},
      "task unconditional takes no prompt: leave 'cat' out",
    ),
    (
      {"task": "infill_text", "prompt": "a cat"},
      "task infill_text fills in each <mask>: put one into the prompt",
    ),
    (
      {"prompt": "a <mask> cat"},
      "the prompt 'a <mask> cat' has a <mask>, which only task infill_text takes; this one is ",
    ),
    (
      {"task": "instruct", "prompt": "draw <break> <image>"},
      "the prompt 'draw <break> <image>' has 1 <image>, and no image is given.",
    ),
    (
      {"task": "instruct", "prompt": "draw", "image": "a.png"},
      "an image is given, and the prompt 'draw' has no <image> for it.",
    ),
    (
      {"task": "infill_text", "prompt": "see <image> <break> <mask>", "image": "a.png"},
      "the prompt 'see <image> <break> <mask>' has <image> in a text: put <break> between them.",
    ),
    (
      {"task": "infill_text", "prompt": "<break> <mask>"},
      "the prompt '<break> <mask>' has an empty segment beside a <break>.",
    ),
    (
      {"task": "infill_image", "image": "a.png"},
      "task infill_image needs a box, left,top,right,bottom in pixels, and none",
    ),
    (
      {"prompt": "cat", "box": (0, 0, 1, 1)},
      "task text_to_image takes no box: leave '0,0,1,1' out, or name a task that takes a box.",
    ),
    (
      {"task": "unconditional", "retrieve": 2},
      "task unconditional takes no retrieve: leave '2' out, or name a task that takes retrieve.",
    ),
    (
      {"prompt": "cat", "length": 9},
      "task text_to_image takes no length: leave '9' out, or name a task that takes length.",
    ),
    ({"task": "interleaved", "length": -1}, r"length is -1; it must lie in \[0, 2\^32\)."),
    ({"prompt": "cat", "seed": -1}, r"seed is -1; it must lie in \[0, 2\^32\)."),
    ({"prompt": "cat", "retrieve": -1}, r"retrieve is -1; it must lie in"),
  ],
)
def test_a_mistake_is_reported_in_one_sentence(fields, sentence):
  fields = {"task": "text_to_image", **fields}
  common = {"seed": fields.pop("seed", 0)}
  name = fields.pop("task")
  with pytest.raises(UserError, match=f"^{sentence}"):
    make_task(name, fields, **common)
  with pytest.raises(UserError, match=f"^my.jsonl, line 3: {sentence}"):
    make_task(name, fields, where="my.jsonl, line 3", **common)


def test_every_task_has_a_name_of_its_own_and_documents_its_fields():
  assert len({cls.name for cls in TASKS}) == len(TASKS)
  assert all(cls.__doc__ and not cls.__doc__.startswith(cls.__name__) for cls in TASKS)


def test_prompts_and_images_are_paired():
  prompts = [{"prompt": "p"}, {"prompt": "q"}]
  assert pair(["p", "q"], ["a", "b"]) == [
    {**prompts[0], "image": "a"},
    {**prompts[1], "image": "b"},
  ]
  assert pair(["p", "q"], ["a"]) == [{**fields, "image": "a"} for fields in prompts]
  assert pair([], ["a", "b"]) == [{"image": "a"}, {"image": "b"}]
  assert pair([], []) == [{}]
  message = "2 prompts and 3 images are given: give one of each for the other, or one for all"
  with pytest.raises(UserError, match=message):
    pair(["p", "q"], ["a", "b", "c"])


def write(path, *lines):
  path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
  return path


def test_a_file_has_one_task_per_line(tmp_path):
  lines = [
    {"prompt": "red apple", "guidance": 5, "top_k": 64},
    "",
    {"task": "caption", "image": "photos/cat.jpg", "seed": 9, "retrieve": 1},
    {"task": "infill_image", "image": "/d/dog.png", "box": [0, 1, 2, 3], "method": "contrastive"},
    {"task": "edit", "image": "gs://bucket/dog.png", "prompt": "blue"},
  ]
  path, sampling = write(tmp_path / "my.jsonl", *lines), SamplingConfig(temperature=2.0)
  apple, cat, dog, blue = read(path, seed=100, sampling=sampling, allow_outside=True)
  assert apple == TextToImage(
    "red apple",
    seed=100,
    retrieve=2,  # The same default as on the command line.
    sampling=SamplingConfig(temperature=2.0, guidance=5.0, top_k=64),
    where=f"{path}, line 1",
  )
  assert (cat.name, cat.image) == ("caption", f"{tmp_path}/photos/cat.jpg")
  assert (cat.seed, cat.retrieve, cat.where) == (9, 1, f"{path}, line 3")
  assert (dog.image, dog.box, dog.sampling.method) == ("/d/dog.png", (0, 1, 2, 3), "contrastive")
  assert (dog.row, dog.seed) == (2, 102)
  assert (blue.image, blue.retrieve) == ("gs://bucket/dog.png", 0)
  assert [t.retrieve for t in read(write(path, lines[0], lines[2]), retrieve=0)] == [0, 1]


@pytest.mark.parametrize(
  ("line", "sentence"),
  [
    ("{", "is not valid JSON"),
    ("[1]", "is list; every line must be one JSON object."),
    ({"prompt": "a", "guidanse": 3}, "has no field 'guidanse': did you mean 'guidance'?"),
    ({"prompt": "a", "sampling": 3}, "has no field 'sampling': "),
    ({"prompt": 3}, ": prompt is 3; it must be a valid string."),
    ({"prompt": "a", "seed": 1.5}, ": seed is 1.5; it must be a valid integer."),
    ({"prompt": "a", "top_p": 2.0}, ": top_p is 2.0; it must be at most 1."),
    ({"prompt": "a", "guidance": "much"}, ": guidance is 'much'; it must be a valid number."),
    ({"task": "caption"}, ": task caption needs an image, and none is given."),
  ],
)
def test_a_wrong_line_is_reported_with_its_number(tmp_path, line, sentence):
  path = write(tmp_path / "my.jsonl", {"prompt": "right"}, line)
  with pytest.raises(UserError, match=f"^{path}, line 2") as error:
    read(path)
  assert sentence in str(error.value)


def test_a_missing_or_empty_file_is_refused(tmp_path):
  with pytest.raises(UserError, match=r"my\.jsonl, which does not exist: give a file"):
    read(tmp_path / "my.jsonl")
  message = r"my\.jsonl, which has no line: give one JSON object per line\."
  with pytest.raises(UserError, match=message):
    read(write(tmp_path / "my.jsonl", ""))

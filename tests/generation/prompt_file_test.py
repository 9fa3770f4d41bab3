import json
import pathlib
import re

import pytest

from cm3leon_jax.config import UserError
from cm3leon_jax.decoding.config import SamplingConfig
from cm3leon_jax.generation.image_tasks import TextToImage
from cm3leon_jax.generation.prompt_file import TASKS, make_task, pair, read
from tests.refusals import refused


def test_a_class_with_a_name_is_a_task_and_stands_on_the_page():
  page = (pathlib.Path(__file__).parents[2] / "docs" / "generating.md").read_text()
  table = page.partition("## Tasks\n")[2].partition("\n\n")[0]
  named = re.findall(r"^\| `(\w+)` ", table, re.MULTILINE)
  assert set(named) == {cls.name for cls in TASKS}
  assert len(TASKS) == len(named) == 9


@pytest.mark.parametrize(
  "fields",
  [
    {"task": "paint"},
    {"task": "text_to_image"},
    {"task": "text_to_image", "prompt": " "},
    {"task": "caption"},
    {"task": "question", "prompt": "what"},
    {"task": "edit", "image": "a.png"},
    {"task": "caption", "image": "a.png", "prompt": "cat"},
    {"task": "text_to_image", "prompt": "cat", "image": "a.png"},
    {"task": "unconditional", "prompt": "cat"},
    {"task": "infill_text", "prompt": "a cat"},
    {"prompt": "a <mask> cat"},
    {"task": "instruct", "prompt": "draw <break> <image>"},
    {"task": "instruct", "prompt": "draw", "image": "a.png"},
    {"task": "infill_text", "prompt": "see <image> <break> <mask>", "image": "a.png"},
    {"task": "infill_text", "prompt": "<break> <mask>"},
    {"task": "infill_image", "image": "a.png"},
    {"prompt": "cat", "box": (0, 0, 1, 1)},
    {"task": "unconditional", "retrieve": 2},
    {"prompt": "cat", "length": 9},
    {"task": "interleaved", "length": -1},
    {"prompt": "cat", "seed": -1},
    {"prompt": "cat", "retrieve": -1},
  ],
)
def test_a_mistake_is_reported_in_one_sentence(fields):
  fields = {"task": "text_to_image", **fields}
  common = {"seed": fields.pop("seed", 0)}
  name = fields.pop("task")
  with refused(UserError):
    make_task(name, fields, **common)
  with refused(UserError):
    make_task(name, fields, where="my.jsonl, line 3", **common)


def test_every_task_has_a_name_of_its_own_and_documents_its_fields():
  assert len({cls.name for cls in TASKS}) == len(TASKS)
  assert all(cls.__doc__ and not cls.__doc__.startswith(f"{cls.__name__}(") for cls in TASKS)


def test_prompts_and_images_are_paired():
  prompts = [{"prompt": "p"}, {"prompt": "q"}]
  assert pair(["p", "q"], ["a", "b"]) == [
    {**prompts[0], "image": "a"},
    {**prompts[1], "image": "b"},
  ]
  assert pair(["p", "q"], ["a"]) == [{**fields, "image": "a"} for fields in prompts]
  assert pair([], ["a", "b"]) == [{"image": "a"}, {"image": "b"}]
  assert pair([], []) == [{}]
  with refused(UserError):
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
    retrieve=2,  # The default is the same on the command line.
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
  "line",
  [
    "{",
    "[1]",
    {"prompt": "a", "guidanse": 3},
    {"prompt": "a", "sampling": 3},
    {"prompt": 3},
    {"prompt": "a", "seed": 1.5},
    {"prompt": "a", "top_p": 2.0},
    {"prompt": "a", "guidance": "much"},
    {"task": "caption"},
  ],
)
def test_a_wrong_line_is_reported_with_its_number(tmp_path, line):
  path = write(tmp_path / "my.jsonl", {"prompt": "right"}, line)
  with refused(UserError):
    read(path)


def test_a_missing_or_empty_file_is_refused(tmp_path):
  with refused(UserError):
    read(tmp_path / "my.jsonl")
  with refused(UserError):
    read(write(tmp_path / "my.jsonl", ""))


@pytest.mark.parametrize(("neighbors", "first"), [(None, 2), (1, 1), (0, 0)])
def test_a_task_retrieves_at_most_what_the_model_was_trained_with(tmp_path, neighbors, first):
  """A line can request more documents. Tasks other than text_to_image retrieve none by default."""
  lines = [{"prompt": "a bell"}, {"task": "infill_text", "prompt": "a <mask> bell"}]
  path = write(tmp_path / "my.jsonl", *lines, {"prompt": "a bell", "retrieve": 3})
  assert [task.retrieve for task in read(path, neighbors=neighbors)] == [first, 0, 3]

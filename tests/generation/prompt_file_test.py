import json
import pathlib
import re

import pytest

from cm3leon_jax.config.sampling import SamplingConfig
from cm3leon_jax.errors import UserError
from cm3leon_jax.generation.image_tasks import TextToImage
from cm3leon_jax.generation.prompt_file import TASKS, pair, read, task_class
from tests.refusals import refused


def test_a_class_with_a_name_is_a_task_and_stands_on_the_page():
  page = (pathlib.Path(__file__).parents[2] / "docs" / "generating.md").read_text()
  table = page.partition("## Tasks\n")[2].partition("\n\n")[0]
  named = re.findall(r"^\| `(\w+)` ", table, re.MULTILINE)
  assert set(named) == {cls.name for cls in TASKS}
  assert len(TASKS) == len(named) == 9


def test_prompts_and_images_are_paired():
  prompts = [{"prompt": "p"}, {"prompt": "q"}]
  assert pair(["p", "q"], ["a", "b"]) == [
    {**prompts[0], "image": "a"},
    {**prompts[1], "image": "b"},
  ]
  assert pair(["p", "q"], ["a"]) == [{**fields, "image": "a"} for fields in prompts]
  assert pair([], ["a", "b"]) == [{"image": "a"}, {"image": "b"}]
  assert pair([], []) == [{}]
  with refused(UserError, "2 prompts and 3 images"):
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


VALID = {
  "text_to_image": {"prompt": "a bell", "retrieve": 1, "seed": 3, "guidance": 2.0, "top_k": 4},
  "caption": {"image": "a.png", "length": 9},
  "infill_image": {"image": "a.png", "box": [0, 0, 4, 4]},
  "instruct": {"prompt": "draw <break> <image>", "image": "a.png"},
}
WRONG = [None, True, -1, 2**33, 1.5, "x", "", [], {}, [[1]], "<mask>", "<break>"]


@pytest.mark.parametrize("name", VALID)
def test_each_wrong_field_of_a_line_is_named_with_its_place(tmp_path, name):
  """A value may also be right, or empty, which counts as absent."""
  valid, path, refusals = {"task": name, **VALID[name]}, tmp_path / "my.jsonl", []
  assert len(read(write(path, valid))) == 1
  for field in (*valid, "guidanse"):
    for value in WRONG:
      try:
        read(write(path, {"prompt": "right"}, {**valid, field: value}))
      except UserError as error:
        refusals.append((field, str(error)))
  assert len(refusals) > 5 * len(valid)
  place = f"{path}, line 2"
  assert [one for one in refusals if not (place in one[1] and one[0] in one[1])] == []
  required = [field for field in ("prompt", "image") if field in task_class(name).required]
  for field in required:
    with refused(UserError, f"{path}, line 1", field):
      read(write(path, {k: v for k, v in valid.items() if k != field}))


@pytest.mark.parametrize(
  ("fields", "fact"),
  [
    ({"task": "paint"}, "'paint'"),
    ({"task": "caption", "image": "a.png", "prompt": "cat"}, "no prompt"),
    ({"prompt": "cat", "length": 9}, "no length"),
    ({"task": "infill_text", "prompt": "a cat"}, "<mask>"),
    ({"prompt": "a <mask> cat"}, "<mask>"),
    ({"task": "instruct", "prompt": "draw <break> <image>"}, "<image>"),
    ({"task": "instruct", "prompt": "draw", "image": "a.png"}, "<image>"),
    ({"task": "infill_text", "prompt": "see <image> <break> <mask>", "image": "a.png"}, "<image>"),
    ({"task": "infill_text", "prompt": "<break> <mask>"}, "<break>"),
    ({"task": "infill_image", "image": "a.png"}, "box"),
  ],
)
def test_fields_that_do_not_belong_together_are_refused(tmp_path, fields, fact):
  path = write(tmp_path / "my.jsonl", {"prompt": "right"}, fields)
  with refused(UserError, f"{path}, line 2", fact):
    read(path)


def test_a_missing_or_empty_file_is_refused(tmp_path):
  path = tmp_path / "my.jsonl"
  with refused(UserError, str(path)):
    read(path)
  with refused(UserError, str(path)):
    read(write(path, ""))


@pytest.mark.parametrize(("neighbors", "first"), [(None, 2), (1, 1), (0, 0)])
def test_a_task_retrieves_at_most_what_the_model_was_trained_with(tmp_path, neighbors, first):
  """A line can request more documents. Tasks other than text_to_image retrieve none by default."""
  lines = [{"prompt": "a bell"}, {"task": "infill_text", "prompt": "a <mask> bell"}]
  path = write(tmp_path / "my.jsonl", *lines, {"prompt": "a bell", "retrieve": 3})
  assert [task.retrieve for task in read(path, neighbors=neighbors)] == [first, 0, 3]

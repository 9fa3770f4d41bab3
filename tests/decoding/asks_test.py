"""What a user asks for is checked, each mistake is told in one sentence, and a file with one a line is read."""

import json

import pytest

from cm3leon_jax.config import UserError
from cm3leon_jax.decoding import asks
from cm3leon_jax.decoding.asks import Ask
from cm3leon_jax.decoding.sampling import SamplingConfig


@pytest.mark.parametrize(
  ("fields", "sentence"),
  [
    (
      {"task": "paint"},
      "task is 'paint'; it must be one of text_to_image, caption, question, infill_text, infill_image, edit, ",
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
      "task caption takes no prompt: leave 'cat' out, or name another",
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
      "task infill_text fills in what <mask> stands for: put one into the prompt",
    ),
    (
      {"prompt": "a <mask> cat"},
      "the prompt 'a <mask> cat' has a <mask>, which only task infill_text takes; this one is text_",
    ),
    (
      {"task": "infill_image", "image": "a.png"},
      "task infill_image needs a box, left,top,right,bottom in pixels, and none",
    ),
    (
      {"prompt": "cat", "box": (0, 0, 1, 1)},
      "a box is given, which only task infill_image takes; this one is text_to_image.",
    ),
    (
      {"task": "unconditional", "retrieve": 2},
      "retrieve is 2; task unconditional retrieves no documents.",
    ),
    ({"prompt": "cat", "length": 9}, "length is 9; task text_to_image writes no text."),
    ({"task": "interleaved", "length": -1}, r"length is -1; it must lie in \[0, 2\^32\)."),
    ({"prompt": "cat", "seed": -1}, r"seed is -1; it must lie in \[0, 2\^32\)."),
    ({"prompt": "cat", "retrieve": -1}, r"retrieve is -1; it must lie in"),
  ],
)
def test_a_mistake_is_told_in_one_sentence(fields, sentence):
  with pytest.raises(UserError, match=f"^{sentence}"):
    asks.check(Ask(**fields))
  with pytest.raises(UserError, match=f"^my.jsonl, line 3: {sentence}"):
    asks.check(Ask(**fields, where="my.jsonl, line 3"))


def test_prompts_and_images_are_paired():
  base = Ask("question", seed=5)
  pairs = lambda *args: [(a.prompt, a.image, a.seed, a.row) for a in asks.pair(base, *args)]
  assert pairs(["p", "q"], ["a", "b"]) == [("p", "a", 5, 0), ("q", "b", 6, 1)]
  assert pairs(["p", "q"], ["a"]) == [("p", "a", 5, 0), ("q", "a", 6, 1)]
  assert pairs([], ["a", "b"]) == [("", "a", 5, 0), ("", "b", 6, 1)]
  assert pairs([], []) == [("", "", 5, 0)]
  with pytest.raises(
    UserError,
    match="2 prompts and 3 images are given: give one of each for the other, or one for all",
  ):
    asks.pair(base, ["p", "q"], ["a", "b", "c"])


def write(path, *lines):
  path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
  return path


def test_a_file_has_one_ask_a_line(tmp_path):
  lines = [
    {"prompt": "red apple", "guidance": 5, "top_k": 64},
    "",
    {"task": "caption", "image": "photos/cat.jpg", "seed": 9, "retrieve": 1},
    {
      "task": "infill_image",
      "image": "/data/dog.png",
      "box": [0, 1, 2, 3],
      "method": "contrastive",
    },
    {"task": "edit", "image": "gs://bucket/dog.png", "prompt": "blue"},
  ]
  path = write(tmp_path / "my.jsonl", *lines)
  apple, cat, dog, blue = asks.read(path, Ask(seed=100, sampling=SamplingConfig(temperature=2.0)))
  assert apple == Ask(
    prompt="red apple",
    seed=100,
    retrieve=2,  # As many as when it stands on the command line.
    sampling=SamplingConfig(temperature=2.0, guidance=5.0, top_k=64),
    where=f"{path}, line 1",
  )
  assert (cat.task, cat.image, cat.seed, cat.retrieve) == (
    "caption",
    f"{tmp_path}/photos/cat.jpg",
    9,
    1,
  )
  assert cat.where == f"{path}, line 3"
  assert (dog.image, dog.box, dog.row, dog.seed, dog.sampling.method) == (
    "/data/dog.png",
    (0, 1, 2, 3),
    2,
    102,
    "contrastive",
  )
  assert (blue.image, blue.retrieve) == ("gs://bucket/dog.png", 0)
  assert [a.retrieve for a in asks.read(write(path, lines[0], lines[2]), Ask(), retrieve=0)] == [
    0,
    1,
  ]


@pytest.mark.parametrize(
  ("line", "sentence"),
  [
    ("{", "is not valid JSON"),
    ("[1]", "is a list; it must be a JSON object."),
    ({"prompt": "a", "guidanse": 3}, "has no field 'guidanse': did you mean 'guidance'?"),
    ({"prompt": "a", "sampling": 3}, "has no field 'sampling': "),
    ({"prompt": 3}, ": prompt is 3; it must be a valid string."),
    ({"prompt": "a", "seed": 1.5}, ": seed is 1.5; it must be a valid integer."),
    ({"prompt": "a", "top_p": 2.0}, ": top_p is 2.0; it must be at most 1."),
    ({"prompt": "a", "guidance": "much"}, ": guidance is 'much'; it must be a valid number."),
    ({"task": "caption"}, ": task caption needs an image, and none is given."),
  ],
)
def test_a_wrong_line_is_named(tmp_path, line, sentence):
  path = write(tmp_path / "my.jsonl", {"prompt": "right"}, line)
  with pytest.raises(UserError, match=f"^{path}, line 2") as error:
    asks.read(path, Ask())
  assert sentence in str(error.value)


def test_no_file_and_no_line(tmp_path):
  with pytest.raises(UserError, match=r"my\.jsonl, which does not exist: give a file"):
    asks.read(tmp_path / "my.jsonl", Ask())
  with pytest.raises(
    UserError, match=r"my\.jsonl, which has no line: give one JSON object a line\."
  ):
    asks.read(write(tmp_path / "my.jsonl", ""), Ask())

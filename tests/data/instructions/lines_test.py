import json

import pytest

from cm3leon_jax.data.instructions.files import open_records
from cm3leon_jax.data.instructions.records import Record
from cm3leon_jax.data.sources.image_folder import ImageFolder
from cm3leon_jax.errors import UserError
from tests.refusals import refused

RIGHT = {"texts": {"question": "how many?", "answer": "two"}, "images": {"image": "a/7.jpg"}}


def read(root, *lines, split="my train", images=None):
  texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
  (root / f"{split}.jsonl").write_text("\n".join(texts) + "\n", encoding="utf-8")
  return list(open_records("jsonl", root, split, images))


def test_a_line_is_a_record(tmp_path):
  named = {**RIGHT, "key": "first", "group": "pond"}
  first, third, fourth = read(tmp_path, named, "", RIGHT, {"texts": {"poem": " Über\nallen "}})
  image = {"image": f"{tmp_path}/a/7.jpg"}
  assert first == Record("first", "pond", RIGHT["texts"], image)
  # Without a key, the key is the line number, counting blank lines, and the group is the image.
  assert third == Record("3", "a/7.jpg", RIGHT["texts"], image)
  assert fourth == Record("4", "4", {"poem": "Über\nallen"}, {})


def test_several_images_and_their_paths(tmp_path):
  images = {"before": "a.png", "after": "/images/b.png", "mask": "x/c.png"}
  (record,) = read(tmp_path, {"images": images}, images=ImageFolder("/images"))
  assert record.images == {**images, "before": "/images/a.png", "mask": "/images/x/c.png"}
  assert record.group == "a.png"
  assert record.texts == {}


@pytest.mark.parametrize(
  "line",
  [
    '{"texts": ',
    "[1]",
    {**RIGHT, "text": {}},
    {**RIGHT, "url": "x"},
    {"texts": "how many?"},
    {"texts": {"a b": "c"}},
    {"texts": {"count": 2}},
    {"images": {"image": " "}},
    {"texts": {"a": "b"}, "images": {"a": "b"}},
    {"key": "x"},
    {**RIGHT, "key": 7},
    {**RIGHT, "group": None},
    {**RIGHT, "key": "1"},
  ],
)  # fmt: skip
def test_a_wrong_line_is_named(tmp_path, line):
  with refused(UserError, "my train.jsonl, line 3"):
    read(tmp_path, RIGHT, "", line)

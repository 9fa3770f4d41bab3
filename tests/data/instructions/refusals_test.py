import copy

import pytest

from cm3leon_jax.config import UserError
from cm3leon_jax.data.instructions.config import FORMATS
from cm3leon_jax.data.instructions.files import open_records
from tests.data.instruction_releases import RELEASES, json_lines, narrative, split_of, write
from tests.data.instructions.files_test import NARRATED, files_of, read
from tests.refusals import refused


def test_unknown_names_and_splits_are_refused_at_once(tmp_path):
  with refused(UserError):
    open_records("visdial", tmp_path, "val")
  with refused(UserError):
    open_records("jsonl", tmp_path, "dev")
  for name, format_ in FORMATS.items():
    if not format_.splits:
      continue
    with refused(UserError):
      open_records(name, tmp_path, "dev")


@pytest.mark.parametrize("name", FORMATS)
def test_an_absent_file_is_refused_at_once(tmp_path, name):
  for file in files_of(name):
    write(tmp_path, RELEASES[name])
    (tmp_path / file).unlink()
    with refused(UserError):
      open_records(name, tmp_path, split_of(name))


@pytest.mark.parametrize("name", FORMATS)
def test_files_of_other_formats_are_refused(tmp_path, name):
  for file in files_of(name):
    for content in ("text", {"a": 1}, [1], b"\xff{"):
      with refused(UserError):
        read(tmp_path, name, **{file: content})


# (format, index of its file, change of the content).
WRONG = [
  ("flickr30k", 0, lambda c: c["images"].append(c["images"][0])),
  ("flickr30k", 0, lambda c: c["images"][0].update(sentences=[])),
  ("flickr30k", 0, lambda c: c["images"][0].pop("sentences")),
  ("flickr30k", 0, lambda c: c["images"].pop(0)),
  ("flickr30k", 0, lambda c: c["images"][1].pop("filename")),
  ("textvqa", 0, lambda c: c["data"].append(c["data"][1])),
  ("textvqa", 0, lambda c: c["data"][1].update(question_id="34603")),
  ("textvqa", 0, lambda c: c["data"][0].pop("answers")),
  ("textvqa", 0, lambda c: c["data"][0].update(answers=[])),
  ("textvqa", 0, lambda c: c["data"][0].update(answers=["a", 1])),
  ("textvqa", 0, lambda c: c["data"][0].update(image_id=7)),
  ("textvqa", 0, lambda c: c["data"][0].update(question=None)),
  ("scienceqa", 0, lambda c: c["1"].pop("image")),
  ("scienceqa", 0, lambda c: c["1"].update(image=1)),
  ("scienceqa", 0, lambda c: c["1"].update(choices=[])),
  ("scienceqa", 0, lambda c: c["1"].update(answer=3)),
  ("scienceqa", 0, lambda c: c["1"].update(answer=-1)),
  ("scienceqa", 0, lambda c: c["1"].update(answer="A")),
  ("scienceqa", 0, lambda c: c["3"].pop("solution")),
  ("scienceqa", 1, lambda c: c["val"].append("3")),
  ("scienceqa", 1, lambda c: c["val"].append("5")),
  ("scienceqa", 1, lambda c: c["val"].append(1)),
  ("scienceqa", 1, lambda c: c.pop("val")),
  ("instruct_pix2pix", 0, lambda c: c[2].append(1)),
  ("instruct_pix2pix", 0, lambda c: c[2].__setitem__(1, "7")),
  ("instruct_pix2pix", 0, lambda c: c[2].__setitem__(0, c[1][0])),
  ("instruct_pix2pix", 0, lambda c: c[2][1].append("2")),
  ("instruct_pix2pix", 0, lambda c: c[2].__setitem__(0, "0000077")),
  ("instruct_pix2pix", 3, lambda c: c.pop("edit")),
  ("llava", 0, lambda c: c[0].update(image=["a.jpg", "b.jpg"])),
  ("llava", 0, lambda c: c[1].pop("conversations")),
  ("llava", 0, lambda c: c[0].pop("conversations")),
  ("llava", 0, lambda c: c[2]["conversations"].pop(0)),
  ("llava", 0, lambda c: c[2]["conversations"][1].update({"from": "human"})),
  ("llava", 0, lambda c: c[2]["conversations"].pop()),
  ("llava", 0, lambda c: c[2]["conversations"][0].pop("value")),
  ("vizwiz", 0, lambda c: c[0].update(answers=[])),
]  # fmt: skip


@pytest.mark.parametrize(("name", "number", "change"), WRONG)
def test_wrong_files_are_named_with_the_id(tmp_path, name, number, change):
  file = list(RELEASES[name])[number]
  content = copy.deepcopy(RELEASES[name][file])
  change(content)
  with refused(UserError):
    read(tmp_path, name, **{file: content})


@pytest.mark.parametrize(
  "line",
  [
    b"{",
    b'"\xff"',
    b"[]",
    b'{"image_id": 7, "caption": "a"}',
    b'{"image_id": "7", "caption": null}',
  ],
)
def test_wrong_lines_are_named_with_their_number(tmp_path, line):
  first = json_lines(narrative("7", 1, "a"))
  lines = first + b"\n" + line + b"\n"  # The line number in the message includes blank lines.
  with refused(UserError):
    read(tmp_path, "localized_narratives", **{NARRATED: lines})

"""What is wrong in the files of a release is named, with the file and the id."""

import copy
import re

import pytest

from cm3leon_jax.config import UserError
from cm3leon_jax.data.instructions.config import FORMATS
from cm3leon_jax.data.instructions.files import open_records
from tests.data.instruction_releases import RELEASES, json_lines, narrative, split_of, write
from tests.data.instructions.files_test import NARRATED, files_of, read


def test_unknown_names_and_splits_are_refused_at_once(tmp_path):
  with pytest.raises(UserError, match="format is 'visdial'; it must be one of coco_2014, "):
    open_records("visdial", tmp_path, "val")
  with pytest.raises(
    UserError, match=r"has no dev\.jsonl: format 'jsonl' reads it for split 'dev'"
  ):
    open_records("jsonl", tmp_path, "dev")
  for name, format_ in FORMATS.items():
    if not format_.splits:
      continue
    message = f"split of format '{name}' is 'dev'; it must be one of {', '.join(format_.splits)}."
    with pytest.raises(UserError, match=re.escape(message)):
      open_records(name, tmp_path, "dev")


@pytest.mark.parametrize("name", FORMATS)
def test_an_absent_file_is_refused_at_once(tmp_path, name):
  for file in files_of(name):
    write(tmp_path, RELEASES[name])
    (tmp_path / file).unlink()
    message = re.escape(f"{tmp_path} has no {file}") + ".* reads it for split"
    with pytest.raises(UserError, match=message):
      open_records(name, tmp_path, split_of(name))


@pytest.mark.parametrize("name", FORMATS)
def test_files_of_other_formats_are_refused(tmp_path, name):
  for file in files_of(name):
    for content in ("text", {"a": 1}, [1], b"\xff{"):
      with pytest.raises(UserError, match=re.escape(str(tmp_path / file))):
        read(tmp_path, name, **{file: content})


# Format, number of its file, a change of the content, and the message after the file's name.
WRONG = [
  ("flickr30k", 0, lambda c: c["images"].append(c["images"][0]),
   ", images: filename 1000092795.jpg is there twice; it must be there once."),
  ("flickr30k", 0, lambda c: c["images"][0].update(sentences=[]),
   ", image 1000092795.jpg has no 'raw'; it must have at least one."),
  ("flickr30k", 0, lambda c: c["images"][0].pop("sentences"),
   ", image 1000092795.jpg must be an object with a list in its field 'sentences'."),
  ("flickr30k", 0, lambda c: c["images"].pop(0),
   " has no image of split 'val'; it has test, train."),
  ("flickr30k", 0, lambda c: c["images"][1].pop("filename"),
   ", images, entry 2 must be an object with a text in its field 'filename'."),
  ("textvqa", 0, lambda c: c["data"].append(c["data"][1]),
   ", data: question_id 34603 is there twice; it must be there once."),
  ("textvqa", 0, lambda c: c["data"][1].update(question_id="34603"),
   ", data, entry 2 must be an object with an integer in its field 'question_id'."),
  ("textvqa", 0, lambda c: c["data"][0].pop("answers"),
   ", question 34602 must be an object with a list in its field 'answers'."),
  ("textvqa", 0, lambda c: c["data"][0].update(answers=[]),
   ", question 34602 must have only texts in its list 'answers', and at least one."),
  ("textvqa", 0, lambda c: c["data"][0].update(answers=["a", 1]),
   ", question 34602 must have only texts in its list 'answers', and at least one."),
  ("textvqa", 0, lambda c: c["data"][0].update(image_id=7),
   ", question 34602 must be an object with a text in its field 'image_id'."),
  ("textvqa", 0, lambda c: c["data"][0].update(question=None),
   ", question 34602 must be an object with a text in its field 'question'."),
  ("scienceqa", 0, lambda c: c["1"].pop("image"),
   ", problem 1 must be an object with a text in its field 'image'."),
  ("scienceqa", 0, lambda c: c["1"].update(image=1),
   ", problem 1 must be an object with a text in its field 'image'."),
  ("scienceqa", 0, lambda c: c["1"].update(choices=[]),
   ", problem 1 must have only texts in its list 'choices', and at least one."),
  ("scienceqa", 0, lambda c: c["1"].update(answer=3),
   ", problem 1 has answer 3; it must be from 0 to 2."),
  ("scienceqa", 0, lambda c: c["1"].update(answer=-1),
   ", problem 1 has answer -1; it must be from 0 to 2."),
  ("scienceqa", 0, lambda c: c["1"].update(answer="A"),
   ", problem 1 must be an object with an integer in its field 'answer'."),
  ("scienceqa", 0, lambda c: c["3"].pop("solution"),
   ", problem 3 must be an object with a text in its field 'solution'."),
  ("scienceqa", 1, lambda c: c["val"].append("3"),
   " has problem 3 twice in 'val'; it must be there once."),
  ("scienceqa", 1, lambda c: c["val"].append("5"),
   " has problem '5' in 'val', which {root}/problems.json does not have."),
  ("scienceqa", 1, lambda c: c["val"].append(1),
   " has problem 1 in 'val', which {root}/problems.json does not have."),
  ("scienceqa", 1, lambda c: c.pop("val"),
   " must be an object with a list in its field 'val'."),
  ("instruct_pix2pix", 0, lambda c: c[2].append(1),
   ", entry 3 must be a list of the name of a folder and the list of its seeds."),
  ("instruct_pix2pix", 0, lambda c: c[2].__setitem__(1, "7"),
   ", entry 3 must be a list of the name of a folder and the list of its seeds."),
  ("instruct_pix2pix", 0, lambda c: c[2].__setitem__(0, c[1][0]),
   ", entry 3 has folder 0000001 a second time; it must be there once."),
  ("instruct_pix2pix", 0, lambda c: c[2][1].append("2"),
   ", entry 3, folder 0000002, has a seed twice; each must be there once."),
  ("instruct_pix2pix", 0, lambda c: c[2].__setitem__(0, "0000077"),
   " names {root}/0000077/prompt.json, which does not exist; give all folders of the "
   "release, or a list of those that are there."),
  ("instruct_pix2pix", 3, lambda c: c.pop("edit"),
   " must be an object with a text in its field 'edit'."),
  ("llava", 0, lambda c: c[0].update(image=["a.jpg", "b.jpg"]),
   ", entry 1 must be an object with a text in its field 'image'."),
  ("llava", 0, lambda c: c[1].pop("conversations"),
   ", entry 2 must be an object with a text in its field 'image'."),
  ("llava", 0, lambda c: c[0].pop("conversations"),
   ", entry 1 must be an object with a list in its field 'conversations'."),
  ("llava", 0, lambda c: c[2]["conversations"].pop(0),
   ", entry 3, turn 1 is from 'gpt'; it must be from 'human'."),
  ("llava", 0, lambda c: c[2]["conversations"][1].update({"from": "human"}),
   ", entry 3, turn 2 is from 'human'; it must be from 'gpt'."),
  ("llava", 0, lambda c: c[2]["conversations"].pop(),
   ", entry 3 has no answer; it must have one turn from 'gpt' or more."),
  ("llava", 0, lambda c: c[2]["conversations"][0].pop("value"),
   ", entry 3, turn 1 must be an object with a text in its field 'value'."),
  ("vizwiz", 0, lambda c: c[0].update(answers=[]),
   ", image VizWiz_val_00000000.jpg has no 'answer'; it must have at least one."),
]  # fmt: skip


@pytest.mark.parametrize(("name", "number", "change", "message"), WRONG)
def test_wrong_files_are_named_with_the_id(tmp_path, name, number, change, message):
  file = list(RELEASES[name])[number]
  content = copy.deepcopy(RELEASES[name][file])
  change(content)
  with pytest.raises(UserError) as error:
    read(tmp_path, name, **{file: content})
  assert str(error.value) == f"{tmp_path / file}{message.format(root=tmp_path)}"


@pytest.mark.parametrize(
  ("line", "message"),
  [
    (b"{", r" is not valid JSON \(.*\)\."),
    (b'"\xff"', r" is not valid JSON \(.*\)\."),
    (b"[]", r" must be an object with a text in its field 'image_id'\."),
    (b'{"image_id": 7, "caption": "a"}', r" must be an object with a text in .* 'image_id'\."),
    (b'{"image_id": "7", "caption": null}', r" must be an object with a text in .* 'caption'\."),
  ],
)
def test_wrong_lines_are_named_with_their_number(tmp_path, line, message):
  first = json_lines(narrative("7", 1, "a"))
  lines = first + b"\n" + line + b"\n"  # A blank line counts, too.
  with pytest.raises(UserError, match=re.escape(f"{tmp_path / NARRATED}, line 3") + message):
    read(tmp_path, "localized_narratives", **{NARRATED: lines})

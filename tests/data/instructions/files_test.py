import copy
import json

import pytest

from cm3leon_jax.config.instructions import FORMATS
from cm3leon_jax.data.instructions.files import CAPTIONS, QUESTIONS, open_records
from cm3leon_jax.data.instructions.records import Record
from cm3leon_jax.errors import UserError
from tests.data.broken_releases import check_reader
from tests.data.instruction_releases import RELEASES, json_lines, narrative, prompt, split_of, write
from tests.refusals import refused

NARRATED = "coco_val_captions.jsonl"


def read(root, name, split=None, **release):
  write(root, {**RELEASES[name], **release})
  return list(open_records(name, root, split or split_of(name)))


@pytest.mark.parametrize("name", FORMATS)
def test_records_have_the_texts_and_images_of_the_table_and_different_keys(tmp_path, name):
  records = read(tmp_path, name)
  assert len(records) >= 2
  assert len({r.key for r in records}) == len(records)
  for record in records:
    assert tuple(record.texts) == (FORMATS[name].texts or ("question", "answer"))
    assert tuple(record.images) == (FORMATS[name].images or ("image",))
    assert all(image.startswith(f"{tmp_path}/") for image in record.images.values())
    assert all(text == text.strip() for text in record.texts.values())
    assert json.loads(json.dumps(record.facts)) == record.facts


def test_vqa_has_the_most_frequent_answer_and_all_of_them_as_facts(tmp_path):
  cat, mats, dog = read(tmp_path, "vqa_v2")
  assert cat == Record(
    key="42000",
    group="42",
    texts={"question": "What is on the mat?", "answer": "cat"},
    images={"image": f"{tmp_path}/val2014/COCO_val2014_000000000042.jpg"},
    facts={"answers": ["cat"] * 9 + ["a cat"]},
  )
  assert mats.texts["answer"] == "1"
  assert dog.texts["answer"] == "yes"
  assert dog.facts["answers"] == ["yes", ""] * 5
  assert {r.texts["answer"] for r in read(tmp_path / "ok", "ok_vqa")} == {"sit"}


def test_vizwiz_unanswerable_questions_say_so(tmp_path):
  soap, color = read(tmp_path, "vizwiz")
  # Two answers are equally frequent, and the first of them is used.
  assert soap.texts == {"question": "What is this?", "answer": "soap"}
  assert color.texts["answer"] == "unanswerable"
  content = copy.deepcopy(RELEASES["vizwiz"]["Annotations/val.json"])
  for entry in content[1]["answers"]:
    entry["answer"] = "unsuitable image"
  _, color = read(tmp_path, "vizwiz", **{"Annotations/val.json": content})
  assert color.texts["answer"] == "unanswerable"
  assert color.facts["answers"] == ["unsuitable image"] * 2


def test_textvqa_blank_answers_do_not_count(tmp_path):
  brand, year = read(tmp_path, "textvqa")  # Skips the third question, which has only blank answers.
  assert brand == Record(
    key="34602",
    group="003a8ae2ef43b901",
    texts={"question": "what brand is it?", "answer": "nokia"},
    images={"image": f"{tmp_path}/train_images/003a8ae2ef43b901.jpg"},
    facts={"answers": ["dakota", "nokia ", "nokia"] + [""] * 7},
  )
  assert year.texts["answer"] == "8"
  assert year.group == brand.group


def test_scienceqa_problems_with_an_image_in_the_order_of_the_split(tmp_path):
  number, state = read(tmp_path, "scienceqa")
  assert state == Record(
    key="1",
    group="1",
    texts={
      "question": "Which state is farthest north?",
      "context": "",
      "options": "(A) West Virginia (B) Louisiana (C) Arizona",
      "answer": "(A)",
      "explanation": "West Virginia is farthest north.",
      "reasoning": "West Virginia is farthest north. So the answer is (A)",
    },
    images={"image": f"{tmp_path}/images/val/1/image.png"},
    facts={"choices": ["West Virginia", "Louisiana ", "Arizona"], "answer_index": 0},
  )
  assert (number.key, number.texts["answer"]) == ("3", "(C)")
  assert number.texts["context"] == "The map shows it."
  (train,) = open_records("scienceqa", tmp_path, "train")
  assert train.images["image"] == f"{tmp_path}/images/train/4/image.png"


def test_scienceqa_without_an_explanation_has_no_reasoning(tmp_path):
  content = copy.deepcopy(RELEASES["scienceqa"]["problems.json"])
  content["3"]["solution"] = " "
  number, state = read(tmp_path, "scienceqa", **{"problems.json": content})
  assert number.texts["reasoning"] == ""
  assert state.texts["reasoning"].endswith("So the answer is (A)")


def test_instruct_pix2pix_one_record_a_seed(tmp_path):
  records = read(tmp_path, "instruct_pix2pix")
  assert records[3] == Record(
    key="0000001/17",
    group="0000001",
    texts={
      "instruction": "make it snow 1",
      "input_caption": "snow 1 by a lake",
      "output_caption": "a lake of snow 1",
    },
    images={"before": f"{tmp_path}/0000001/17_0.jpg", "after": f"{tmp_path}/0000001/17_1.jpg"},
  )


@pytest.mark.parametrize(("count", "sizes"), [(20, (18, 1, 1)), (33, (29, 2, 2)), (1, (0, 0, 1))])
def test_instruct_pix2pix_splits_are_parts_of_the_list(tmp_path, count, sizes):
  names = [f"{i:07d}" for i in range(count)]
  write(tmp_path, {f"{name}/prompt.json": prompt("ice") for name in names})
  write(tmp_path, {"seeds.json": [[name, [5]] for name in names]})  # Seeds may be integers.
  parts = [list(open_records("instruct_pix2pix", tmp_path, s)) for s in ("train", "val", "test")]
  assert tuple(map(len, parts)) == sizes
  assert [r.key for part in parts for r in part] == [f"{name}/5" for name in names]


def test_flickr30k_groups_are_those_of_localized_narratives(tmp_path):
  guys, friends = read(tmp_path, "flickr30k")
  image = {"image": f"{tmp_path}/flickr30k-images/1000092795.jpg"}
  assert guys == Record("1000092795/0", "1000092795", {"caption": "Two young guys."}, image)
  assert (friends.key, friends.texts["caption"]) == ("1000092795/1", "Two friends")
  (men,) = open_records("flickr30k", tmp_path, "train")
  assert men.texts["caption"] == "Four men on top."
  line = json_lines(narrative("1000092795", 1, "Two men."))
  name = "localized_narratives"
  write(tmp_path, {"flickr30k_val_captions.jsonl": line})
  (narrated,) = open_records(name, tmp_path, "flickr30k_val")
  assert (narrated.group, narrated.images) == (guys.group, guys.images)


def test_localized_narratives_one_record_a_caption(tmp_path):
  cows, grass, key = read(tmp_path, "localized_narratives")
  image = {"image": f"{tmp_path}/val2017/000000137576.jpg"}
  assert cows == Record("137576/0", "137576", {"caption": "In this image there are cows."}, image)
  assert (grass.key, grass.images) == ("137576/1", image)
  # Skips the first caption of this image, which is blank.
  assert (key.key, key.images["image"]) == ("8/1", f"{tmp_path}/val2017/000000000008.jpg")


@pytest.mark.parametrize(
  ("split", "image_id", "files", "image"),
  [
    ("open_images_train", "0a", 10, "train/0a.jpg"),
    ("coco_train", "9", 4, "train2017/000000000009.jpg"),
    ("ade20k_train", "ADE_train_01", 1, "ADEChallengeData2016/images/training/ADE_train_01.jpg"),
  ],
)
def test_the_large_files_of_localized_narratives(tmp_path, split, image_id, files, image):
  """Reads all files of a split in order; reads only the file of captions if it exists."""
  start = split.replace("images_train", "images_train_v6")
  shards = [f"-{i:05d}-of-{files:05d}" for i in range(files)] if files > 1 else [""]
  names = [f"{start}_localized_narratives{shard}.jsonl" for shard in shards]
  for i, name in enumerate(names):
    line = narrative(image_id, i, f"caption {i}", timed_caption=[], traces=[[]])
    write(tmp_path, {name: json_lines(line)})
  records = list(open_records("localized_narratives", tmp_path, split))
  assert [r.texts["caption"] for r in records] == [f"caption {i}" for i in range(files)]
  assert {r.images["image"] for r in records} == {f"{tmp_path}/{image}"}
  assert [r.key for r in records] == [f"{image_id}/{i}" for i in range(files)]
  (tmp_path / names[-1]).unlink()
  with refused(UserError, names[-1]):
    open_records("localized_narratives", tmp_path, split)
  write(tmp_path, {f"{start}_captions.jsonl": json_lines(narrative(image_id, 1, "short"))})
  (short,) = open_records("localized_narratives", tmp_path, split)
  assert short.texts["caption"] == "short"


@pytest.mark.parametrize("name", sorted(set(FORMATS) - {*CAPTIONS, *QUESTIONS}))
def test_a_broken_file_is_read_or_refused_by_its_name(tmp_path, name):
  split = split_of(name)
  check_reader(
    tmp_path, RELEASES[name], ("prompt.json",), lambda: list(open_records(name, tmp_path, split))
  )

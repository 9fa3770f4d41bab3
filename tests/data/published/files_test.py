import pytest

from cm3leon_jax.data.published.examples import Example, caption_prompts, check_images, choose
from cm3leon_jax.data.published.files import SPLITS, open_examples
from cm3leon_jax.data.sources.image_folder import ImageFolder
from cm3leon_jax.errors import UserError
from tests.data.broken_releases import check_reader
from tests.data.releases import DENSE, RELEASES, write
from tests.refusals import refused


def read(root, name, split="val", **release):
  write(root, {**RELEASES[name], **release})
  return list(open_examples(name, root, split))


@pytest.mark.parametrize(
  ("year", "image"), [("2014", "COCO_val2014_000000000285.jpg"), ("2017", "000000000285.jpg")]
)
def test_coco(tmp_path, year, image):
  room, bear = read(tmp_path, f"coco_{year}")
  assert (room.key, room.references) == ("139", ("A room with a lamp. ",))
  captions = ("A bear on grass.", "One brown bear.")
  assert bear == Example("285", "285", f"{tmp_path}/val{year}/{image}", references=captions)
  prompts = [e.prompt for e in caption_prompts([room, bear])]
  assert prompts == ["A room with a lamp.", *captions]
  assert {e.group for e in choose(caption_prompts([room, bear]), 2)} == {"139", "285"}


def test_coco_karpathy(tmp_path):
  bus, tree = read(tmp_path, "coco_karpathy", "test")
  image = f"{tmp_path}/val2014/COCO_val2014_000000000007.jpg"
  assert bus == Example("7", "7", image, references=("a bus", "a red bus"))
  assert tree.key == "6"
  others = {"train": "8", "restval": "9", "val": "5"}
  for split, key in others.items():
    assert [e.key for e in open_examples("coco_karpathy", tmp_path, split)] == [key]


def test_vqa_v2(tmp_path):
  cat, mats, dog = read(tmp_path, "vqa_v2")
  assert cat == Example(
    key="42000",
    group="42",
    image=f"{tmp_path}/val2014/COCO_val2014_000000000042.jpg",
    prompt="What is on the mat?",
    references=("cat",) * 9 + ("a cat",),
    question_type="what is on",
    answer_type="other",
  )
  assert (mats.group, mats.answer_type, mats.references) == ("42", "number", ("1",) * 10)
  assert dog.references == ("yes", "") * 5  # An empty answer is a reference, too.
  assert dog.image.endswith("COCO_val2014_000000185565.jpg")


def test_ok_vqa_has_the_answers_that_its_metric_compares(tmp_path):
  examples = read(tmp_path, "ok_vqa")
  assert [e.key for e in examples] == ["42000", "42001", "185565000"]
  assert {e.references for e in examples} == {("sit", "sit")}


def test_vizwiz(tmp_path):
  soap, color = read(tmp_path, "vizwiz")
  assert soap == Example(
    key="VizWiz_val_00000000.jpg",
    group="VizWiz_val_00000000.jpg",
    image=f"{tmp_path}/val/VizWiz_val_00000000.jpg",
    prompt="What is this?",
    references=("soap", "unanswerable"),
    answer_type="other",
    answerable=True,
  )
  assert (color.answer_type, color.answerable) == ("unanswerable", False)


def test_paragraphs_in_the_order_of_the_split_the_first_of_an_image(tmp_path):
  dog, cat = read(tmp_path, "vg_paragraphs")
  assert dog == Example("32", "32", f"{tmp_path}/VG_100K_2/32.jpg", references=("A dog. ",))
  assert cat == Example("31", "31", f"{tmp_path}/VG_100K/31.jpg", references=("A cat. It sleeps.",))
  assert [e.key for e in open_examples("vg_paragraphs", tmp_path, "train")] == ["33"]


def test_visdial_one_example_a_judged_round(tmp_path):
  second, first = read(tmp_path, "visdial")
  assert second == Example(
    key="185565/2",
    group="185565",
    image=f"{tmp_path}/VisualDialog_val2018/VisualDialog_val2018_000000185565.jpg",
    prompt="is it sunny",
    references=("no",),
    caption="a dog on a lawn",
    history=(("is there a dog", "yes, one"),),
    candidates=("white", "no", "yes, one"),
    relevance=(0.0, 1.0, 0.4),
    answer_index=1,
  )
  assert (first.key, first.history, first.relevance) == ("9/1", (), (1.0, 0.0))


def test_annotations_may_stand_beside_the_images_or_apart_from_them(tmp_path):
  for name, file in (("coco_2014", "captions_val2014.json"), ("vizwiz", "val.json")):
    (content,) = RELEASES[name].values()
    write(tmp_path / name, {file: content})
    examples = list(open_examples(name, tmp_path / name, "val", ImageFolder("gs://bucket/images")))
    assert all(e.image.startswith("gs://bucket/images/val") for e in examples)


def test_images_are_checked_only_when_asked(tmp_path):
  examples = read(tmp_path, "vg_paragraphs")
  write(tmp_path, {"VG_100K_2/32.jpg": b"x"})
  with refused(UserError, "VG_100K/31.jpg"):
    check_images(examples)
  write(tmp_path, {"VG_100K/31.jpg": b"x"})
  check_images(examples)


@pytest.mark.parametrize("name", SPLITS)
def test_a_broken_file_is_read_or_refused_by_its_name(tmp_path, name):
  unread = ("train_split.json", "test_split.json")
  check_reader(tmp_path, RELEASES[name], unread, lambda: list(open_examples(name, tmp_path, "val")))


@pytest.mark.parametrize("round_id", [0, 4])
def test_a_round_that_the_dialog_does_not_have(tmp_path, round_id):
  dense = [{"image_id": 185565, "round_id": round_id, "gt_relevance": [1.0]}]
  with refused(UserError, "visdial_1.0_val.json", f"round {round_id}"):
    read(tmp_path, "visdial", **{DENSE: dense})

import functools
import json
import os
import pathlib
from unittest import mock

from hypothesis import example, given, settings
from hypothesis import strategies as st
import numpy as np
from PIL import Image
import pyarrow as pa
from pyarrow import parquet
import pytest

from cm3leon_jax.config import UserError
from cm3leon_jax.data.instructions import sources as instruction_sources
from cm3leon_jax.data.instructions.config import InstructionsConfig
from cm3leon_jax.data.instructions.files import open_records
from cm3leon_jax.data.published.files import open_examples
from cm3leon_jax.data.raw import reader as raw_pairs
from cm3leon_jax.data.sources import formats
from cm3leon_jax.data.sources.image_folder import ImageFolder
from cm3leon_jax.data.sources.records import Rejected, images_of
from cm3leon_jax.evaluation.likelihood.document_files import read_documents
from cm3leon_jax.files.atomic import open_filesystem
from cm3leon_jax.generation import prompt_file
from cm3leon_jax.generation.tasks import PromptLayout
from cm3leon_jax.scenes.config import ScenesConfig
from cm3leon_jax.scenes.instructions import ScenesTasks
from tests.data.stores import IMAGE_TOKENS, VOCAB
from tests.refusals import refused

DRAWN = {"scenes": ScenesTasks(ScenesConfig())}

# InstructPix2Pix has two images per seed: the name of the seed with "_0.jpg" and with "_1.jpg".
SUFFIX = "_0.jpg"


def write(root, file, *lines) -> None:
  (root / file).parent.mkdir(parents=True, exist_ok=True)
  (root / file).write_text("\n".join(map(json.dumps, lines)))


def of_records(name, split, root, allow_outside) -> list[str]:
  images = ImageFolder(str(root), allow_outside=True) if allow_outside else None
  return [x for r in open_records(name, root, split, images) for x in r.images.values()]


def of_examples(name, split, root, allow_outside) -> list[str]:
  images = ImageFolder(str(root), allow_outside=True) if allow_outside else None
  return [x.image for x in open_examples(name, root, split, images)]


def lines(root, name, allow_outside):
  write(root, "train.jsonl", {"texts": {"q": "what?"}, "images": {"image": name}})
  return of_records("jsonl", "train", root, allow_outside)


def llava(split, root, name, allow_outside):
  turns = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "red"}]
  write(root, f"{split}.json", [{"image": name, "conversations": turns}])
  return of_records("llava", split, root, allow_outside)


def coco(opened, root, name, allow_outside):
  captions = [{"image_id": 1, "caption": "red"}]
  images = [{"id": 1, "file_name": name, "width": 9, "height": 9}]
  write(root, "captions_val2017.json", {"images": images, "annotations": captions})
  box = {"image_id": 1, "category_id": 1, "bbox": [0, 0, 9, 9], "iscrowd": 0}
  about = {"images": images, "annotations": [box], "categories": [{"id": 1, "name": "box"}]}
  write(root, "instances_val2017.json", about)
  return opened(root, allow_outside)


def karpathy(opened, root, name, allow_outside):
  about = {"split": "val", "sentences": [{"raw": "red"}], "cocoid": 1}
  about |= {"filepath": "", "filename": name}
  write(root, "dataset_coco.json", {"images": [about]})
  return opened(root, allow_outside)


def flickr(root, name, allow_outside):
  about = {"split": "val", "sentences": [{"raw": "red"}], "filename": name}
  write(root, "dataset_flickr30k.json", {"images": [about]})
  return of_records("flickr30k", "val", root, allow_outside)


def vizwiz(opened, root, name, allow_outside):
  about = {"image": name, "question": "what?", "answers": [{"answer": "red"}]}
  write(root, "val.json", [{**about, "answer_type": "other", "answerable": 1}])
  return opened(root, allow_outside)


def textvqa(root, name, allow_outside):
  about = {"question_id": 1, "image_id": name.removesuffix(".jpg"), "question": "what?"}
  write(root, "TextVQA_0.5.1_val.json", {"data": [{**about, "answers": ["red"]}]})
  return of_records("textvqa", "val", root, allow_outside)


def narratives(root, name, allow_outside):
  about = {"image_id": name.removesuffix(".jpg"), "caption": "red"}
  write(root, "open_images_test_captions.jsonl", about)
  return of_records("localized_narratives", "open_images_test", root, allow_outside)


def scienceqa(root, name, allow_outside):
  about = {"question": "what?", "choices": ["a", "b"], "answer": 0, "hint": "", "solution": ""}
  write(root, "problems.json", {"7": {**about, "image": name}})
  write(root, "pid_splits.json", {"val": ["7"]})
  return of_records("scienceqa", "val", root, allow_outside)


def pix2pix(root, name, allow_outside):
  write(root, "seeds.json", [["p", [name.removesuffix(SUFFIX)]], ["q", []]])
  write(root, "p/prompt.json", {"input": "a", "edit": "b", "output": "c"})
  return of_records("instruct_pix2pix", "train", root, allow_outside)[:1]


def prompts(root, name, allow_outside):
  write(root, "my.jsonl", {"task": "caption", "image": name})
  options = {"allow_outside": True} if allow_outside else {}
  return [task.image for task in prompt_file.read(root / "my.jsonl", **options)]


def documents(fields, root, name, allow_outside):
  write(root, "docs.jsonl", fields(name))
  layout = PromptLayout(VOCAB, IMAGE_TOKENS, 8, 64, lambda text: np.zeros(1, np.int32), None)
  loaded = []
  patch = pytest.MonkeyPatch()
  with patch.context() as patched:
    opened = raw_pairs.open_image
    patched.setattr(
      raw_pairs, "open_image", lambda path, name: loaded.append(path) or opened(path, name)
    )
    tokenizer = mock.Mock(encode=lambda images: np.zeros((len(images), IMAGE_TOKENS), np.int32))
    list(read_documents(root / "docs.jsonl", layout, tokenizer, allow_outside=allow_outside))
  return [path for path in loaded if isinstance(path, str)]


def raw(file, fields, root, name, allow_outside):
  if file.endswith(".parquet"):
    parquet.write_table(pa.table({k: [v] for k, v in fields(name).items()}), root / file)
  else:
    write(root, file, fields(name))
  source = root if file in formats.LISTS else root / file
  found = []
  for part in formats.parts(str(source)):
    if part.kind != "sidecars":
      found += formats.read(part, allow_outside)
  [item] = found
  if isinstance(item, Rejected):
    raise UserError(item.message)
  return images_of(item)


def pair(name):
  return {"key": "a", "image": name, "caption": "red"}


def interleaved(name):
  return {"key": "a", "segments": [{"text": "red"}, {"image": name}]}


def column(name):
  return {"image": {"bytes": None, "path": name}, "caption": "red"}


def maps(root, name, allow_outside):
  """Opens the map of an image: the file of the same name in the folder that the task names."""
  write(root, "train.jsonl", {"texts": {"q": "what?"}, "images": {"image": name}})
  task = {"name": "draw", "format": "jsonl", "train": "train", "maps": {"edges": "depth"}}
  task |= {"templates": ("{edges} <break> {q} <break> {image}",), "target": "image"}
  config = InstructionsConfig(root=str(root), own_tasks=(task,))
  if allow_outside:
    config = InstructionsConfig(root=str(root), own_tasks=(task,), allow_outside=True)
  [task] = config.own_tasks
  records = instruction_sources.open_task(task, "train", config, DRAWN)
  return [record.images["image"] for record in records]


def reader(write_one, opened, *names):
  """Returns `write_one` with a function that opens a source by the arguments `names`."""
  return functools.partial(write_one, functools.partial(opened, *names))


# Format -> (folder of the reader's images, reader).
READERS = {
  "jsonl": ("", lines),
  "maps": ("", maps),
  "llava": ("train2017", functools.partial(llava, "llava_instruct_150k")),
  "llava mix": ("", functools.partial(llava, "llava_v1_5_mix665k")),
  "coco": ("val2017", reader(coco, of_records, "coco_2017", "val")),
  "coco objects": ("val2017", reader(coco, of_records, "coco_objects", "val2017")),
  "coco evaluation": ("val2017", reader(coco, of_examples, "coco_2017", "val")),
  "karpathy": ("", reader(karpathy, of_records, "coco_karpathy", "val")),
  "karpathy evaluation": ("", reader(karpathy, of_examples, "coco_karpathy", "val")),
  "flickr30k": ("flickr30k-images", flickr),
  "vizwiz": ("val", reader(vizwiz, of_records, "vizwiz", "val")),
  "vizwiz evaluation": ("val", reader(vizwiz, of_examples, "vizwiz", "val")),
  "textvqa": ("train_images", textvqa),
  "narratives": ("test", narratives),
  "scienceqa": ("images/val/7", scienceqa),
  "pix2pix": ("p", pix2pix),
  "prompts": ("", prompts),
  "pairs to score": ("", functools.partial(documents, pair)),
  "documents to score": ("", functools.partial(documents, interleaved)),
  "pairs.jsonl": ("", functools.partial(raw, "pairs.jsonl", pair)),
  "interleaved.jsonl": ("", functools.partial(raw, "interleaved.jsonl", interleaved)),
  "a.jsonl": ("", functools.partial(raw, "a.jsonl", interleaved)),
  "parquet": ("", functools.partial(raw, "a.parquet", column)),
}
# Readers that treat an absolute path as relative to their folder instead of rejecting it.
PREFIXED = ("textvqa", "narratives")
# Names that a reader rejects. {root} is the root, {out} an image outside of the root, and {up} the
# relative path from the reader's folder to the parent of the root.
ESCAPES = {
  "up": "{up}/outside/a_0.jpg",
  "into and up": "x/{up}/../outside/a_0.jpg",
  "absolute": "{out}",
  "absolute and up": "{root}/../outside/a_0.jpg",
  "link": "link_0.jpg",
  "linked folder": "linked/a_0.jpg",
  "device": "/dev/zero",
  "file url": "file://{out}",
  "local url": "local://{out}",
  "file url inside": "file://{root}/a_0.jpg",
  "http": "http://127.0.0.1:9/a_0.jpg",
  "https": "https://127.0.0.1:9/a_0.jpg",
  "memory": "memory://a_0.jpg",
  "bucket": "gs://bucket/a_0.jpg",
  "chain": "zip://a_0.jpg::{out}",
  "odd protocol": "x+y://a_0.jpg",
}


@pytest.fixture
def root(tmp_path):
  (tmp_path / "outside").mkdir()
  for number in (0, 1):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "outside" / f"a_{number}.jpg")
  (tmp_path / "set" / "depth").mkdir(parents=True)
  return tmp_path / "set"


def fill(root, folder) -> pathlib.Path:
  """Writes images to a reader's folder, and links to files inside and outside of the folder."""
  base, outside = root / folder, root.parent / "outside"
  base.mkdir(parents=True, exist_ok=True)
  for number in (0, 1):
    Image.new("RGB", (8, 8), "blue").save(base / f"a_{number}.jpg")
    (base / f"link_{number}.jpg").symlink_to(outside / f"a_{number}.jpg")
    (base / f"within_{number}.jpg").symlink_to(base / f"a_{number}.jpg")
  (base / "linked").symlink_to(outside)
  return base


def made(read, root, name) -> tuple[list[str], str]:
  """Returns (images that a reader finds, error message); one of them is empty."""
  try:
    return read(root, name, False), ""
  except UserError as error:
    return [], str(error)


def is_inside(path: str, root) -> bool:
  return "://" not in path and pathlib.Path(os.path.realpath(path)).is_relative_to(root)


@pytest.mark.parametrize("escape", ESCAPES)
@pytest.mark.parametrize("reader", READERS)
def test_an_image_outside_of_the_folder_is_refused(root, reader, escape):
  folder, read = READERS[reader]
  base = fill(root, folder)
  up = os.path.relpath(root.parent, base)
  name = ESCAPES[escape].format(out=root.parent / "outside" / "a_0.jpg", root=root, up=up)
  found, message = made(read, root, name)
  if found:
    assert reader in PREFIXED
    assert all(is_inside(path, root) for path in found)
    assert not any(map(os.path.exists, found))
    return
  assert "is not in" in message
  assert message.startswith(("task draw: ", str(root)))
  assert message.endswith(".")
  # The message does not reveal whether the file exists.
  (root.parent / "outside" / "a_0.jpg").unlink()
  assert made(read, root, name) == ([], message)


@pytest.mark.parametrize("name", ["a_0.jpg", "within_0.jpg", "{base}/a_0.jpg", "./a_0.jpg"])
@pytest.mark.parametrize("reader", READERS)
def test_an_image_in_the_folder_is_read(root, reader, name):
  folder, read = READERS[reader]
  base = fill(root, folder)
  if name.startswith("{") and reader in PREFIXED:
    return
  [path] = read(root, name.format(base=base), False)
  assert (base / "a_0.jpg").samefile(path)
  red, _, blue = raw_pairs.load_image(path, 4)[0, 0]
  assert red < 9 < 200 < blue


@pytest.mark.parametrize("escape", ["up", "absolute", "link", "linked folder"])
@pytest.mark.parametrize("reader", sorted(set(READERS) - set(PREFIXED)))
def test_whoever_trusts_a_file_reads_images_from_everywhere(root, reader, escape):
  folder, read = READERS[reader]
  base = fill(root, folder)
  up = os.path.relpath(root.parent, base)
  name = ESCAPES[escape].format(out=root.parent / "outside" / "a_0.jpg", up=up)
  [path] = read(root, name, True)
  assert (root.parent / "outside" / "a_0.jpg").samefile(path)


def test_a_map_that_is_a_link_out_of_its_folder_is_refused(root):
  fill(root, "")
  (root / "depth" / "a_0.jpg").symlink_to(root.parent / "outside" / "a_0.jpg")
  with refused(UserError):
    maps(root, "a_0.jpg", False)


@pytest.mark.parametrize("folder", ["../outside", "{}", "linked"])
def test_texts_of_instruct_pix2pix_are_beside_its_list(root, folder):
  outside = root.parent / "outside"
  write(outside, "prompt.json", {"input": "a", "edit": "secret", "output": "c"})
  (root / "linked").symlink_to(outside)
  write(root, "seeds.json", [[folder.format(outside), ["a"]], ["q", []]])
  with refused(UserError):
    list(open_records("instruct_pix2pix", root, "train"))


@pytest.mark.parametrize("subset", ["../outside", "http://127.0.0.1:9", "linked"])
@pytest.mark.parametrize("opened", [open_records, open_examples])
def test_the_subset_of_vqa_is_a_folder_in_the_folder(root, subset, opened):
  (root / "linked").symlink_to(root.parent / "outside")
  question = {"question_id": 1, "image_id": 2, "question": "what?"}
  asked = {"data_subtype": subset, "questions": [question]}
  write(root, "v2_OpenEnded_mscoco_val2014_questions.json", asked)
  answer = {"question_id": 1, "answers": [{"answer": "red"}]}
  answer |= {"question_type": "what", "answer_type": "other"}
  write(root, "v2_mscoco_val2014_annotations.json", {"annotations": [answer]})
  with refused(UserError):
    list(opened("vqa_v2", root, "val"))


def test_a_folder_of_images_apart_from_the_file_counts(root):
  """Names are relative to this folder, so names in the folder of the file are rejected."""
  fill(root, "")
  outside = root.parent / "outside"
  write(root, "train.jsonl", {"images": {"image": str(outside / "a_0.jpg")}})
  [record] = open_records("jsonl", root, "train", ImageFolder(str(outside)))
  assert record.images == {"image": str(outside / "a_0.jpg")}
  write(root, "train.jsonl", {"images": {"image": str(root / "a_0.jpg")}})
  with refused(UserError):
    list(open_records("jsonl", root, "train", ImageFolder(str(outside))))


def test_in_a_bucket_only_names_of_the_same_folder_are_right():
  folder = ImageFolder("gs://bucket/set")
  assert folder.find("a/b.png", "") == folder.find("gs://bucket/set/a/b.png", "")
  assert folder.find("x/../b.png", "") == "gs://bucket/set/b.png"
  for name in (
    "../other/a.png", "/set/a.png", "/etc/passwd", "gs://bucket/other/a.png", "gs://bucket/set",
    "gs://bucket/set/../other/a.png", "gs://bucket/set/../other/x://a.png", "gs://bucket/settle/a",
    "gs://other/set/a.png", "gcs://bucket/set/a.png", "file:///etc/passwd", "http://x/a.png",
    "x::file:///etc/passwd", "memory://bucket/set/a.png",
  ):  # fmt: skip
    with refused(UserError):
      folder.find(name, "f")


def test_the_home_folder_is_no_part_of_a_name(root, monkeypatch):
  """Regression: a name with "~" in a file of the current folder led to the home folder."""
  monkeypatch.setenv("HOME", str(root.parent / "outside"))
  monkeypatch.chdir(root)
  for folder in ("", "."):
    found = ImageFolder(folder).find("~/a_0.jpg", "f")
    assert open_filesystem(found)[1] == str(root / "~" / "a_0.jpg")
    assert ImageFolder(folder).find("a_0.jpg", "f") == "a_0.jpg"


PARTS = ["..", ".", "", "a", "link", "~", "/", "file:", "http:", "gs:", "b_0.jpg", "\0", "\ud800"]


@given(st.lists(st.sampled_from(PARTS), max_size=8).map("/".join))
@example("//a")
@example("a/link/../../b_0.jpg")
@settings(max_examples=400, deadline=None)
def test_any_name_is_in_the_folder_or_refused(tmp_path_factory, name):
  """Opens exactly the path that was checked."""
  root = tmp_path_factory.getbasetemp() / "any" / "set"
  (root / "a").mkdir(parents=True, exist_ok=True)
  if not (root / "a" / "link").exists():
    (root / "a" / "link").symlink_to(root.parent)
  try:
    path = ImageFolder(str(root)).find(name, "f")
  except UserError:
    return
  fs, opened = raw_pairs.open_filesystem(path)
  assert "file" in fs.protocol
  assert pathlib.Path(os.path.realpath(opened)).is_relative_to(root.resolve())

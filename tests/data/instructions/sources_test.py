import json
import os
import re
import sys

import numpy as np
from PIL import Image
import pytest

from cm3leon_jax.config.instructions import make_task
from cm3leon_jax.config.settings import default_config, settings_from_config
from cm3leon_jax.data.documents.store import DocumentStore
from cm3leon_jax.data.instructions import sources, stores
from cm3leon_jax.data.instructions.edges import ImageMap, canny_edges
from cm3leon_jax.data.instructions.samples import read_targets
from cm3leon_jax.data.instructions.task_files import load_tasks
from cm3leon_jax.errors import UserError
from cm3leon_jax.tokenizers.text import TextTokenizer
from cm3leon_jax.tokenizers.vqgan import ImageTokenizer
from tests.data.instruction_releases import RELEASES, write
from tests.generation.run import SETTINGS, make_run
from tests.refusals import refused

DRAW = {
  "name": "draw",
  "format": "coco_2017",
  "root": "coco",
  "target": "image",
  "train": "val",
  "templates": ["{edges} <break> {caption} <break> {image}"],
  "maps": {"edges": "canny"},
}
ASK = {
  "name": "ask",
  "format": "jsonl",
  "root": "asked",
  "target": "answer",
  "heldout": "val",
  "templates": ["Question: {question}\nContext: {context?}\nAnswer: {answer}. <break> {image}"],
}


def config_with(root, *tasks, **fields):
  config = default_config()
  config.instructions.update({"own_tasks": tasks, "root": str(root), **fields})
  return settings_from_config(config).instructions


def open_task(root, fields, split="train"):
  config = config_with(root, fields)
  return list(sources.open_task(config.own_tasks[0], split, config))


def write_lines(path, *lines):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def line(image="a.png", **texts):
  texts = {"question": "how many?", "context": "", "answer": "two", **texts}
  return {"texts": texts, "images": {"image": image}}


def save_image(path, seed=0, side=8):
  path.parent.mkdir(parents=True, exist_ok=True)
  pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
  Image.fromarray(pixels).save(path)
  return pixels


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
  root = tmp_path_factory.mktemp("run")
  make_run(root)
  tokenizer = TextTokenizer(root / "text_tokenizer", SETTINGS.vocab)
  image_tokenizer = ImageTokenizer.load(root / "vqgan")
  return stores.RecordEncoder(tokenizer.encode, image_tokenizer, SETTINGS.vocab, 96), tokenizer


def rejected(folder):
  text = (folder / stores.REJECTED).read_text()
  return {(found := json.loads(x))["key"]: found["reason"] for x in text.splitlines()}


def test_maps_are_computed_or_lie_in_a_folder_under_the_name_of_the_image(tmp_path):
  write(tmp_path / "coco", RELEASES["coco_2017"])
  (tmp_path / "maps/depth").mkdir(parents=True)
  maps = {"edges": "canny", "lines": "scribble", "depth": "maps/depth"}
  template = "{edges} <break> {lines} <break> {depth} <break> {image}"
  record, *_ = open_task(tmp_path, {**DRAW, "maps": maps, "templates": [template]})
  image = f"{tmp_path}/coco/val2017/000000000139.jpg"
  assert record.images == {
    "image": image,
    "edges": ImageMap("canny", image),
    "lines": ImageMap("scribble", image),
    "depth": f"{tmp_path}/maps/depth/000000000139.jpg",
  }
  assert record.texts == {"caption": "A room with a lamp."}


def test_a_store_holds_the_codes_of_maps_and_sets_aside_what_has_none(encoder, tmp_path):
  encoder, _ = encoder
  write(tmp_path / "coco", RELEASES["coco_2017"])
  pixels = save_image(tmp_path / "coco/val2017/000000000139.jpg")
  save_image(tmp_path / "coco/val2017/000000000285.jpg", 1)
  depth = save_image(tmp_path / "maps/depth/000000000139.jpg", 2)
  maps = {"edges": "canny", "depth": "maps/depth"}
  fields = {**DRAW, "maps": maps, "templates": ["{edges} <break> {depth} <break> {image}"]}
  task = make_task({**fields, "templates": fields["templates"]})
  records = open_task(tmp_path, fields)
  found = stores.write_store(tmp_path / "store", task, records, encoder)
  assert (found["documents"], found["rejected"]) == (1, 2)
  (document,) = DocumentStore(tmp_path / "store", SETTINGS.vocab)
  read = [stores.square_pixels(records[0].images[x], 8) for x in ("edges", "depth", "image")]
  np.testing.assert_array_equal(read[0], canny_edges(read[2]))
  assert np.abs(read[1].astype(int) - depth).mean() < 60  # The file is compressed.
  assert np.abs(read[2].astype(int) - pixels).mean() < 60
  for segment, image in zip(document.segments, read, strict=True):
    codes = encoder.image_tokenizer.encode(image[None])[0]
    np.testing.assert_array_equal(SETTINGS.vocab.image_codes(segment.tokens), codes)
  reasons = rejected(tmp_path / "store")
  assert set(reasons) == {"285/0", "285/1"}
  absent = f"image {tmp_path}/maps/depth/000000000285.jpg cannot be read"
  assert all(reason.startswith(absent) for reason in reasons.values())


@pytest.mark.parametrize(
  "fields",
  [
    {**ASK, "maps": {"edges": "canny"}},
    {**ASK, "target": "image", "maps": {"context": "canny"}},
  ],
)  # fmt: skip
def test_maps_that_records_cannot_have_are_named(tmp_path, fields):
  write_lines(tmp_path / "asked/train.jsonl", line())
  (tmp_path / "maps/depth").mkdir(parents=True)
  with refused(UserError, "map"):
    open_task(tmp_path, fields)


def test_computed_maps_need_opencv_and_other_tasks_do_not(tmp_path, monkeypatch):
  write_lines(tmp_path / "asked/train.jsonl", line())
  write(tmp_path / "coco", RELEASES["coco_2017"])
  monkeypatch.setitem(sys.modules, "cv2", None)  # As if the module is not installed.
  assert len(open_task(tmp_path, ASK)) == 1
  with pytest.raises(UserError, match=r"task draw: .* need OpenCV.*\[demo\]"):
    open_task(tmp_path, DRAW)


@pytest.mark.parametrize(
  "changes",
  [{"root": "../other"}, {"root": "/OTHER"}, {"root": "link"}, {"root": "gs://bucket/x"},
   {"images": "http://127.0.0.1:9/"}, {"images": "../other"}, {"maps": {"depth": "../other"}},
   {"train": "../../other/train"}, {"train": "/OTHER/train"}],
)  # fmt: skip
def test_fields_name_places_below_the_root_only(tmp_path, changes):
  """A task file may come from a stranger, and a record's images are checked against its folder."""
  other = tmp_path / "other"
  for folder in (tmp_path / "data/asked", other):
    write_lines(folder / "train.jsonl", line())
  (tmp_path / "data/link").symlink_to(other)
  changes = json.loads(json.dumps(changes).replace("/OTHER", str(other)))
  [field] = changes
  task = make_task({**ASK, **changes})
  config = config_with(tmp_path / "data")
  with pytest.raises(UserError, match=f"^task ask: its {field}: path .*is not in .*/data; name a"):
    list(sources.open_task(task, "train", config))
  if "://" not in str(changes) and field != "maps":
    trusted = config_with(tmp_path / "data", allow_outside=True)
    assert len(list(sources.open_task(task, "train", trusted))) == 1


def test_a_pipe_is_not_read_as_a_list_of_records(tmp_path):
  (tmp_path / "asked").mkdir()
  os.mkfifo(tmp_path / "asked/train.jsonl")
  with pytest.raises(UserError, match=r"^task ask: .*train\.jsonl is not a regular file"):
    open_task(tmp_path, ASK)


def test_without_a_root_the_folder_of_the_task_file_is_the_root(tmp_path):
  write_lines(tmp_path / "asked/train.jsonl", line())
  (tmp_path / "tasks.yaml").write_text(json.dumps([ASK]))
  config = config_with("", tasks=str(tmp_path / "tasks.yaml"))
  [record] = sources.open_task(*load_tasks(config), "train", config)
  assert record.images == {"image": f"{tmp_path}/asked/a.png"}
  assert config_with("").folder == config_with("", tasks="cm3leon").folder == ""


def test_only_the_first_records_of_a_split_are_read(tmp_path):
  write_lines(tmp_path / "asked/train.jsonl", *(line() for _ in range(5)))
  write_lines(tmp_path / "asked/val.jsonl", *(line() for _ in range(4)))
  for fields, trained, heldout in (
    ({}, 5, 4),
    ({"records": 3}, 3, 4),
    ({"records": 9, "heldout_records": 2}, 5, 2),
    ({"heldout_records": 0}, 5, 4),
  ):
    task = {**ASK, **fields}
    assert [r.key for r in open_task(tmp_path, task)] == [str(i + 1) for i in range(trained)]
    assert len(open_task(tmp_path, task, "heldout")) == heldout
  assert len(open_task(tmp_path, {**ASK, "heldout": "val"}, "heldout")) == 4


def test_a_record_may_have_facts_for_a_judge(tmp_path):
  write_lines(tmp_path / "asked/train.jsonl", {**line(), "facts": {"n": 2}}, line())
  assert [record.facts for record in open_task(tmp_path, ASK)] == [{"n": 2}, {}]
  write_lines(tmp_path / "asked/train.jsonl", {**line(), "facts": [2]})
  with refused(UserError, "train.jsonl", "line 1", "facts"):
    open_task(tmp_path, ASK)


def test_what_is_wrong_in_records_is_set_aside_with_the_reason(encoder, tmp_path):
  encoder, tokenizer = encoder
  folder = tmp_path / "asked"
  for name in ("a", "cut"):
    save_image(folder / f"{name}.png", side=48)
  cut = (folder / "cut.png").read_bytes()
  (folder / "cut.png").write_bytes(cut[: len(cut) // 2])
  (folder / "text.png").write_text("no image")
  (folder / "empty.png").write_bytes(b"")
  (folder / "folder.png").mkdir()
  unreadable = ("cut", "text", "empty", "folder", "absent")
  write_lines(
    folder / "train.jsonl",
    line(),
    *(line(f"{name}.png") for name in unreadable),
    line(answer=" \n "),
    line(question=""),
    line(answer="word " * 200),
    line(context="Two birds\nfly.", answer="two\n  birds"),
  )
  task = make_task(ASK)
  found = stores.write_store(tmp_path / "store", task, open_task(tmp_path, ASK), encoder)
  assert (found["documents"], found["rejected"]) == (2, 8)
  reasons = rejected(tmp_path / "store")
  for number, name in enumerate(unreadable, 2):
    said = "is a folder" if name == "folder" else "cannot be read ("
    assert reasons[str(number)].startswith(f"image {folder}/{name}.png {said}")
  assert reasons["7"] == "record 7 has an empty answer, which task ask requires."
  assert reasons["8"] == "record 8 has an empty question, which task ask requires."
  assert re.fullmatch(
    r"its sample has \d+ tokens, of which \d+ belong to answer; a row has space for 97: shorten "
    r"it, or raise config\.data\.sequence_length\.",
    reasons["9"],
  )
  store = DocumentStore(tmp_path / "store", SETTINGS.vocab)
  texts = [tokenizer.decode(document.segments[0].tokens) for document in store]
  # Removes the template line whose context is empty. White space in records becomes single spaces.
  assert texts == [
    "Question: how many?\nAnswer: two.",
    "Question: how many?\nContext: Two birds fly.\nAnswer: two birds.",
  ]
  answers = [
    tokenizer.decode(document.segments[0].tokens[start - 1 : stop - 1])
    for document, (start, stop) in zip(store, read_targets(tmp_path / "store", 2))
  ]
  assert answers == ["two", "two birds"]

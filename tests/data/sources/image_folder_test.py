import functools
import json
import os
import pathlib
import random
from unittest import mock

from hypothesis import example, given, settings
from hypothesis import strategies as st
import numpy as np
from PIL import Image
import pyarrow as pa
from pyarrow import parquet
import pytest

from cm3leon_jax.config.instructions import FORMATS, InstructionsConfig
from cm3leon_jax.data.instructions import sources as instruction_sources
from cm3leon_jax.data.instructions.files import open_records
from cm3leon_jax.data.published.files import SPLITS, open_examples
from cm3leon_jax.data.raw import reader as raw_pairs
from cm3leon_jax.data.sources import formats
from cm3leon_jax.data.sources.image_folder import ImageFolder
from cm3leon_jax.data.sources.records import Rejected, images_of
from cm3leon_jax.errors import UserError
from cm3leon_jax.evaluation.likelihood.document_files import read_documents
from cm3leon_jax.files.atomic import open_filesystem
from cm3leon_jax.generation import prompt_file
from cm3leon_jax.generation.tasks import PromptLayout
from tests.data import broken_releases, instruction_releases, releases
from tests.data.stores import IMAGE_TOKENS, VOCAB
from tests.refusals import refused


def write(root, file, *lines) -> None:
  (root / file).parent.mkdir(parents=True, exist_ok=True)
  (root / file).write_text("\n".join(map(json.dumps, lines)))


def lines(root, name, allow_outside):
  write(root, "train.jsonl", {"texts": {"q": "what?"}, "images": {"image": name}})
  images = ImageFolder(str(root), allow_outside=True) if allow_outside else None
  return [x for r in open_records("jsonl", root, "train", images) for x in r.images.values()]


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
  records = instruction_sources.open_task(task, "train", config)
  return [record.images["image"] for record in records]


READERS = {
  "jsonl": lines,
  "maps": maps,
  "prompts": prompts,
  "pairs to score": functools.partial(documents, pair),
  "documents to score": functools.partial(documents, interleaved),
  "pairs.jsonl": functools.partial(raw, "pairs.jsonl", pair),
  "interleaved.jsonl": functools.partial(raw, "interleaved.jsonl", interleaved),
  "a.jsonl": functools.partial(raw, "a.jsonl", interleaved),
  "parquet": functools.partial(raw, "a.parquet", column),
}
# Names that a reader rejects. {root} is the root, and {out} an image outside of the root.
ESCAPES = {
  "up": "../outside/a_0.jpg",
  "into and up": "x/../../outside/a_0.jpg",
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


def fill(root) -> None:
  """Writes an image, and links to files inside and outside of the folder."""
  outside = root.parent / "outside"
  Image.new("RGB", (8, 8), "blue").save(root / "a_0.jpg")
  (root / "link_0.jpg").symlink_to(outside / "a_0.jpg")
  (root / "within_0.jpg").symlink_to(root / "a_0.jpg")
  (root / "linked").symlink_to(outside)


def made(read, root, name) -> tuple[list[str], str]:
  """Returns (images that a reader finds, error message); one of them is empty."""
  try:
    return read(root, name, False), ""
  except UserError as error:
    return [], str(error)


def is_inside(path: str, root) -> bool:
  return "://" not in path and pathlib.Path(os.path.realpath(path)).is_relative_to(root)


# One reader is tested with all names, and all other readers with two of them.
CASES = [(reader, name) for reader in READERS for name in ("up", "link")]
CASES += [("jsonl", name) for name in ESCAPES if name not in ("up", "link")]


@pytest.mark.parametrize(("reader", "escape"), CASES)
def test_an_image_outside_of_the_folder_is_refused(root, reader, escape):
  read = READERS[reader]
  fill(root)
  name = ESCAPES[escape].format(out=root.parent / "outside" / "a_0.jpg", root=root)
  found, message = made(read, root, name)
  assert not found
  assert "is not in" in message
  assert message.startswith(("task draw: ", str(root)))
  # The message does not reveal whether the file exists.
  (root.parent / "outside" / "a_0.jpg").unlink()
  assert made(read, root, name) == ([], message)


@pytest.mark.parametrize("reader", READERS)
def test_an_image_in_the_folder_is_read(root, reader):
  fill(root)
  [path] = READERS[reader](root, "within_0.jpg", False)
  assert (root / "a_0.jpg").samefile(path)
  [path] = READERS[reader](root, "link_0.jpg", True)  # A trusted file may name images everywhere.
  assert (root.parent / "outside" / "a_0.jpg").samefile(path)


RELEASED = [(open_records, name, instruction_releases) for name in FORMATS]
RELEASED += [(open_examples, name, releases) for name in SPLITS]


@pytest.mark.parametrize(("opened", "name", "files"), RELEASED)
def test_no_text_of_a_release_leads_out_of_its_folder(root, opened, name, files):
  """Replaces each text of a release by paths out of the folder."""
  outside, rng, refusals = root.parent / "outside", random.Random(0), 0
  split = files.split_of(name) if files is instruction_releases else "val"
  for file, content in list(files.RELEASES[name].items())[:4]:
    releases.write(root, files.RELEASES[name])
    is_lines = isinstance(content, bytes)
    whole = [json.loads(line) for line in content.splitlines()] if is_lines else content
    found = list(broken_releases.places(whole))
    for place in rng.sample(found, min(12, len(found))):
      for escape in (
        f"{'../' * 20}{outside}/a_0.jpg",
        f"{outside}/a_0.jpg",
        "http://127.0.0.1:9/a",
      ):
        changed = broken_releases.replaced(whole, place, escape)
        content = "".join(json.dumps(x) + "\n" for x in changed).encode() if is_lines else changed
        releases.write(root, {file: content})
        try:
          items = list(opened(name, root, split))
        except UserError:
          refusals += 1
          continue
        images = [x.images.values() if hasattr(x, "images") else [x.image] for x in items]
        assert all(is_inside(path, root) for paths in images for path in paths)
  assert refusals


def test_a_map_that_is_a_link_out_of_its_folder_is_refused(root):
  fill(root)
  (root / "depth" / "a_0.jpg").symlink_to(root.parent / "outside" / "a_0.jpg")
  with refused(UserError, "is not in"):
    maps(root, "a_0.jpg", False)


def test_a_folder_of_images_apart_from_the_file_counts(root):
  """Names are relative to this folder, so names in the folder of the file are rejected."""
  fill(root)
  outside = root.parent / "outside"
  write(root, "train.jsonl", {"images": {"image": str(outside / "a_0.jpg")}})
  [record] = open_records("jsonl", root, "train", ImageFolder(str(outside)))
  assert record.images == {"image": str(outside / "a_0.jpg")}
  write(root, "train.jsonl", {"images": {"image": str(root / "a_0.jpg")}})
  with refused(UserError, "is not in"):
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
    with refused(UserError, "is not in"):
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

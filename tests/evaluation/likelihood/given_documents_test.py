import dataclasses
import json

from etils import epath
import numpy as np
from PIL import Image
import pytest

from cm3leon_jax.config import UserError
from cm3leon_jax.data.documents.store import Document, Segment, write_documents
from cm3leon_jax.data.raw import reader
from cm3leon_jax.data.sources.records import RawInterleaved, RawPair, RawText
from cm3leon_jax.evaluation.likelihood import given_documents
from cm3leon_jax.evaluation.likelihood.given_documents import Checked, DocumentFile, open_documents
from cm3leon_jax.files.json_files import write_json
from cm3leon_jax.generation.tasks import PromptLayout
from cm3leon_jax.runs import stages
from tests.data.stores import IMAGE_TOKENS, VOCAB
from tests.refusals import refused

POSITIONS = 64
TOKENIZERS = {"text_tokenizer": "t1", "vqgan": "v1"}


def encode(text):
  return np.array([VOCAB.num_special + len(word) for word in text.split()], np.int32)


LAYOUT = PromptLayout(VOCAB, IMAGE_TOKENS, 8, POSITIONS, encode, None)


class Tokenizer:
  """Fake tokenizer: all codes of an image are the red value of its first pixel, modulo 64."""

  def encode(self, images):
    return np.repeat(images[:, 0, 0, :1].astype(np.int32) % 64, IMAGE_TOKENS, axis=1)


def save_image(path, red, size=(8, 8)):
  Image.new("RGB", size, (red, 0, 0)).save(path)


@pytest.fixture
def write(tmp_path):
  save_image(tmp_path / "a.png", 5)
  (tmp_path / "photos").mkdir()
  save_image(tmp_path / "photos" / "b.png", 9)

  def call(*lines, **options):
    path = tmp_path / "docs.jsonl"
    path.write_text("".join(x if isinstance(x, str) else json.dumps(x) + "\n" for x in lines))
    return open_documents(path, LAYOUT, TOKENIZERS, **options)

  return call


def read(documents, size=10):
  return [d for _, part in documents.parts(size, range(100), Tokenizer()) for d in part]


def test_every_form_is_read_as_training_documents_are(write, tmp_path):
  origin = {"source": "s", "license": "CC0-1.0", "attribution": "me"}
  file = write(
    {"text": "a bell"},
    "\n",
    {"key": "p", "image": "a.png", "caption": "two red keys", "concept": "key", **origin},
    {"group": "g", "segments": [{"image": "photos/b.png"}, {"text": "so"}, {"image": "a.png"}]},
    {"image": str(tmp_path / "a.png"), "caption": "c", "facts": {}, "split": "heldout"},
  )
  checked = file.check()
  assert (checked.documents, checked.pairs) == (4, 2)
  text, pair, mixed, absolute = read(file)
  assert [d.key for d in (text, pair, mixed, absolute)] == [
    "docs.jsonl/0", "p", "docs.jsonl/2", "docs.jsonl/3",
  ]  # fmt: skip
  assert (pair.source, pair.license, pair.attribution, pair.concept) == (*origin.values(), "key")
  assert mixed.group == mixed.concept == "g"
  five, nine = (np.full(IMAGE_TOKENS, VOCAB.text_size + code) for code in (5, 9))
  expected = {
    text.key: [(False, encode("a bell"))],
    "p": [(False, encode("two red keys")), (True, five)],
    mixed.key: [(True, nine), (False, encode("so")), (True, five)],
    absolute.key: [(False, encode("c")), (True, five)],
  }
  for document in (text, pair, mixed, absolute):
    for segment, (is_image, tokens) in zip(document.segments, expected[document.key], strict=True):
      assert segment.is_image == is_image
      np.testing.assert_array_equal(segment.tokens, tokens)


def test_the_fields_of_a_line_decide_what_it_is():
  read_record = given_documents.read_record
  assert read_record('{"text": "Cats sleep."}', "f, line 1", "k") == RawText("k", "Cats sleep.")
  pair = read_record('{"image": "cat.jpg", "caption": "a cat"}', "f, line 1", "k")
  assert pair == RawPair("k", "cat.jpg", "a cat")
  assert given_documents.segments_of(pair) == [("text", "a cat"), ("image", "cat.jpg")]
  line = '{"key": "m", "segments": [{"text": "a"}, {"image": "b.png"}]}'
  assert read_record(line, "f, line 1", "k") == RawInterleaved(
    "m", ({"text": "a"}, {"image": "b.png"})
  )


def test_images_that_are_not_square_are_cropped_or_padded(write, tmp_path):
  save_image(tmp_path / "wide.png", 5, (24, 8))
  line = {"image": "wide.png", "caption": "a"}
  codes = {}
  for crop in ("center", "pad"):
    file = write(line, crop=crop)
    codes[crop] = read(file)[0].segments[1].tokens[0] - VOCAB.text_size
    codes[crop, "digest"] = file.check().digest
  assert (codes["center"], codes["pad"]) == (5, 255 % 64)  # The padding is white.
  assert codes["center", "digest"] != codes["pad", "digest"]


def test_the_digest_changes_with_lines_and_images(write, tmp_path):
  line = {"image": "a.png", "caption": "a"}
  first = write(line).check()
  assert write(line).check() == first
  assert write({**line, "caption": "b"}).check().digest != first.digest
  save_image(tmp_path / "a.png", 6)
  assert write(line).check().digest != first.digest


def test_parts_are_read_in_turn_and_only_where_they_are_wanted(write, monkeypatch):
  lines = [{"image": "a.png", "caption": f"{'x' * i}"} for i in range(1, 8)]
  file, encoded = write(*lines), []
  monkeypatch.setattr(
    reader,
    "load_images",
    lambda paths, *_: encoded.extend(paths) or np.zeros((len(paths), 8, 8, 3)),
  )
  parts = file.parts(3, {1, 2}, Tokenizer())
  assert not encoded
  number, part = next(parts)
  assert (number, len(encoded)) == (1, 3)
  assert [d.key for d in part] == [f"docs.jsonl/{i}" for i in (3, 4, 5)]
  assert [(n, len(rest)) for n, rest in parts] == [(2, 1)]
  assert len(encoded) == 4


LONG = " ".join(["w"] * (POSITIONS + 1))


@pytest.mark.parametrize(
  "line",
  [
    '{"text": \n',
    [1],
    {"txt": "a"},
    {"text": "a", "licence": "x"},
    {"image": "a.png", "text": "a"},
    {"text": " "},
    {"image": "a.png", "caption": ""},
    {"key": "k", "segments": []},
    {"segments": [{}]},
    {"text": 5},
    {"image": "a.png"},
    {"image": "no.png", "caption": "a"},
    {"image": "photos", "caption": "a"},
    {"image": "docs.jsonl", "caption": "a"},
    {"text": LONG},
    {"segments": [{"image": "a.png"}] * 4},
  ],
  ids=lambda line: str(line)[:50],
)  # fmt: skip
def test_a_wrong_line_is_refused_in_one_sentence(write, line):
  with refused(UserError):
    write({"text": "all right"}, line).check()


def test_a_document_that_fills_all_positions_is_taken(write):
  longest = " ".join(["w"] * (POSITIONS - 1))
  assert write({"text": longest}).check().documents == 1


def test_files_that_are_no_documents_are_refused(write, tmp_path):
  (tmp_path / "latin.jsonl").write_bytes(b'{"text": "\xe9"}\n')
  empty = write("\n\n").path
  for path in (tmp_path / "none.jsonl", tmp_path, empty, tmp_path / "latin.jsonl"):
    with refused(UserError):
      open_documents(path, LAYOUT, TOKENIZERS).check()


def stored(folder, sizes, config=None):
  """Writes the store of a finished stage. Negative sizes are segments of an image."""

  def segment(n):
    return Segment(n < 0, np.full(abs(n), VOCAB.text_size if n < 0 else 40, np.int32))

  documents = [
    Document(f"d{i}", tuple(map(segment, of)), "s", "l", "a") for i, of in enumerate(sizes)
  ]
  write_documents(folder, documents, VOCAB)
  done = {"config": config or {}, "summary": {}, "seconds": 1.0, "id": "made"}
  write_json(folder.parent / stages.DONE, done)
  return folder


def test_a_store_is_checked_by_lengths_alone_and_read_in_parts(tmp_path, monkeypatch):
  monkeypatch.setattr(given_documents, "BLOCK", 2)
  sizes = [(3, -16), (5,), (-16, 3), (3, -16), (3, -16, 4), (62, -1)]
  folder = stored(epath.Path(tmp_path) / "documents" / "pairs", sizes[:-1])
  opened = open_documents(folder, LAYOUT, TOKENIZERS)
  checked = opened.check()
  assert checked == Checked(5, 2, checked.digest)
  parts = {n: [d.key for d in part] for n, part in opened.parts(2, {0, 2})}
  assert parts == {0: ["d0", "d1"], 2: ["d4"]}
  assert dataclasses.replace(opened, made="again").check().digest != checked.digest
  folder = stored(epath.Path(tmp_path) / "documents" / "long", sizes)
  with refused(UserError):
    open_documents(folder, LAYOUT, TOKENIZERS).check()
  folder = stored(epath.Path(tmp_path) / "documents" / "empty", [])
  with refused(UserError):
    open_documents(folder, LAYOUT, TOKENIZERS).check()


def test_a_store_of_other_tokenizers_is_refused(tmp_path):
  folder, config = (
    epath.Path(tmp_path) / "documents" / "pairs",
    {"inputs": {"raw": "r", **TOKENIZERS}},
  )
  opened = open_documents(stored(folder, [(3, -16)], config), LAYOUT, TOKENIZERS)
  assert not isinstance(opened, DocumentFile)
  with refused(UserError):
    open_documents(folder, LAYOUT, {**TOKENIZERS, "vqgan": "v2"})

import dataclasses

import numpy as np
from PIL import Image
import pytest

from cm3leon_jax.config.instructions import InstructionTask
from cm3leon_jax.data.documents.store import DocumentStore
from cm3leon_jax.data.instructions import stores
from cm3leon_jax.data.instructions.records import Record
from cm3leon_jax.data.instructions.samples import read_targets
from cm3leon_jax.tokenizers.text import TextTokenizer
from cm3leon_jax.tokenizers.vqgan import ImageTokenizer
from tests.generation.run import SETTINGS, make_run

VQA = InstructionTask(
  name="vqa",
  templates=("Question: {question} Answer: {answer}. <break> {image}",),
  target="answer",
  format="jsonl",
)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
  root = tmp_path_factory.mktemp("run")
  make_run(root)
  tokenizer = TextTokenizer(root / "text_tokenizer", SETTINGS.vocab)
  return stores.RecordEncoder(
    tokenizer.encode, ImageTokenizer.load(root / "vqgan"), SETTINGS.vocab, 64
  ), tokenizer


def record(i, image, **texts):
  texts = {"question": "which color?", "answer": f"red apple {i}", **texts}
  return Record(f"r{i}", f"g{i // 2}", texts, {"image": image}, {"count": i})


def pixels(seed):
  return np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)


def test_documents_hold_texts_codes_and_targets(encoder, tmp_path, monkeypatch):
  encoder, tokenizer = encoder
  monkeypatch.setattr(stores, "SHARD", 4)
  Image.fromarray(pixels(0)).save(tmp_path / "0.png")
  images = [str(tmp_path / "0.png"), *(pixels(i) for i in range(1, 10))]
  found = stores.write_store(
    tmp_path / "store", VQA, (record(i, image) for i, image in enumerate(images)), encoder
  )
  store = DocumentStore(tmp_path / "store", SETTINGS.vocab)
  targets = read_targets(tmp_path / "store", len(store))
  assert len(store) == 10
  assert found["documents"] == 10
  assert found["rejected"] == 0
  assert found["target_tokens"] == sum(targets[:, 1] - targets[:, 0])
  for i, (start, stop) in enumerate(targets):
    document = store[i]
    text, image = document.segments
    assert (document.key, document.group, document.facts) == (f"r{i}", f"g{i // 2}", {"count": i})
    assert tokenizer.decode(text.tokens[start - 1 : stop - 1]).strip() == f"red apple {i}"
    expected = encoder.image_tokenizer.encode(pixels(i)[None])[0]
    np.testing.assert_array_equal(SETTINGS.vocab.image_codes(image.tokens), expected)


def test_some_of_the_given_images_are_redrawn_and_no_predicted_one(encoder, tmp_path):
  encoder, _ = encoder
  tokenizer = encoder.image_tokenizer
  edit = InstructionTask(
    name="edit", templates=("{image} <break> {question} <break> {after}",), target="after",
    format="jsonl",
  )  # fmt: skip
  texts = {"question": "which color?"}
  found = [
    Record(f"r{i}", "g", texts, {"image": pixels(i), "after": pixels(i + 50)}) for i in range(40)
  ]
  encoder = dataclasses.replace(encoder, redrawn=0.5)
  stores.write_store(tmp_path / "store", edit, found, encoder)
  plain = tokenizer.encode(np.stack([one.images["image"] for one in found]))
  redrawn = tokenizer.encode(tokenizer.decode(plain))
  assert (plain != redrawn).any(axis=1).sum() > 20
  after = tokenizer.encode(np.stack([one.images["after"] for one in found]))
  store, number = DocumentStore(tmp_path / "store", SETTINGS.vocab), 0
  for i, document in enumerate(store):
    given, predicted = (SETTINGS.vocab.image_codes(document.segments[j].tokens) for j in (0, 2))
    number += stores.is_redrawn(edit, document.key, 0.5)
    expected = redrawn[i] if stores.is_redrawn(edit, document.key, 0.5) else plain[i]
    np.testing.assert_array_equal(given, expected)
    np.testing.assert_array_equal(predicted, after[i])
  assert 10 <= number <= 30

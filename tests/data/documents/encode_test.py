import json

import numpy as np
from PIL import Image
import pytest

from cm3leon_jax.config.data import RawConfig
from cm3leon_jax.config.tokenizers import TextTokenizerConfig
from cm3leon_jax.data.documents.encode import (
  EncodeJob,
  code_usage,
  encode_documents,
)
from cm3leon_jax.data.documents.store import DocumentStore
from cm3leon_jax.data.raw import ingest, reader
from cm3leon_jax.data.sources.records import SPLITS
from cm3leon_jax.errors import UserError
from cm3leon_jax.stages import stages, table
from cm3leon_jax.stages.shards import Runner
from cm3leon_jax.tokenizers.text import TextTokenizer, train_text_tokenizer
from cm3leon_jax.vocab import VocabLayout
from tests.refusals import refused

VOCAB = VocabLayout(num_special=8, text_size=280, image_size=16)
CAPTIONS = [f"a {color} square </s>" for color in ("red", "green", "blue", "gray", "white")]


class BrightnessTokenizer:
  """Encodes an 8x8 image as four codes: the brightness of each quarter, quantized to `levels`."""

  def __init__(self, levels):
    self.levels = levels

  def encode(self, images):
    quarters = images.reshape(len(images), 2, 4, 2, 4, 3).mean((2, 4, 5))
    return (quarters * self.levels / 256).astype(np.int32).reshape(len(images), 4)


@pytest.fixture
def raw(tmp_path):
  source = tmp_path / "source"
  source.mkdir()
  pairs = []
  for i in range(20):
    pixels = np.full((8, 8, 3), 12 * i, np.uint8)
    pixels[:4, 4:] = 255
    Image.fromarray(pixels).save(source / f"{i}.png")
    split = "heldout" if i % 4 == 0 else "train"
    about = {"source": "s", "license": "CC0-1.0", "attribution": "a", "group": f"g{i // 2}"}
    pairs.append(
      {"key": f"k{i}", "image": f"{i}.png", "caption": CAPTIONS[i % 5], "split": split, **about}
    )
  texts = [
    {"key": f"t{i}", "text": f"Text {i} about a red square.", "split": "train"} for i in range(3)
  ]
  segments = [{"image": "0.png"}, {"text": "between"}, {"image": "5.png"}]
  pages = [{"key": "page", "segments": segments, "split": "train", "group": "g"}]
  for name, records in (("pairs", pairs), ("texts", texts), ("interleaved", pages)):
    (source / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
  config = RawConfig(source=str(source), resolution=8)
  ingest.prepare(config, ingest.parts_of(config), tmp_path / "raw", Runner())
  return tmp_path / "raw"


@pytest.fixture
def text_tokenizer(tmp_path):
  train_text_tokenizer(CAPTIONS * 4, VOCAB, TextTokenizerConfig(), tmp_path / "text")
  return TextTokenizer(tmp_path / "text", VOCAB)


def encode(raw, text_tokenizer, folder, levels=16, max_caption_tokens=512, batch_size=4):
  tokenizers = (text_tokenizer, BrightnessTokenizer(levels))
  sizes = (8, max_caption_tokens, batch_size)
  job = EncodeJob(str(raw), str(folder), lambda: tokenizers, VOCAB, *sizes)
  return encode_documents(job, {}, Runner())


def test_document_i_is_pair_i(raw, text_tokenizer, tmp_path):
  summary = encode(raw, text_tokenizer, tmp_path)
  image_tokenizer = BrightnessTokenizer(16)
  for split in SPLITS:
    store = DocumentStore(tmp_path / f"{split}_pairs", VOCAB)
    pairs = reader.read_pairs(raw, split)
    assert len(store) == len(pairs) == summary[split]["pairs"]
    for i, pair in enumerate(pairs):
      document = store[i]
      caption, image = document.segments
      assert (document.key, document.group, document.license) == (pair.key, pair.group, "CC0-1.0")
      assert document.concept == pair.concept == pair.group  # The default concept is the group.
      assert (caption.is_image, image.is_image) == (False, True)
      assert text_tokenizer.decode(caption.tokens) == pair.caption
      expected = image_tokenizer.encode(reader.load_image(pair.image, 8)[None])[0]
      assert VOCAB.image_codes(image.tokens).tolist() == expected.tolist()


def test_texts_and_counts(raw, text_tokenizer, tmp_path):
  summary = encode(raw, text_tokenizer, tmp_path)
  store = DocumentStore(tmp_path / "train_texts", VOCAB)
  assert [text_tokenizer.decode(store[i].segments[0].tokens) for i in range(3)] == [
    f"Text {i} about a red square." for i in range(3)
  ]
  assert len(DocumentStore(tmp_path / "heldout_texts", VOCAB)) == 0
  train = summary["train"]
  assert (train["pairs"], train["texts"], train["interleaved"]) == (15, 3, 1)
  assert (train["image_tokens"], train["captions_cut"]) == (68, 0)
  between = len(text_tokenizer.encode("between"))
  assert train["text_tokens"] == sum(store.segment_lengths(i)[0].sum() for i in range(3)) + between
  pairs = DocumentStore(tmp_path / "train_pairs", VOCAB)
  assert train["caption_tokens"] == sum(pairs.segment_lengths(i)[0][0] for i in range(15))
  json.dumps(summary)


def test_interleaved_documents_keep_their_order(raw, text_tokenizer, tmp_path):
  encode(raw, text_tokenizer, tmp_path)
  (page,) = [*(DocumentStore(tmp_path / "train_interleaved", VOCAB)[i] for i in range(1))]
  assert (page.key, page.group, page.concept) == ("page", "g", "g")
  assert [s.is_image for s in page.segments] == [True, False, True]
  assert text_tokenizer.decode(page.segments[1].tokens) == "between"
  codes = [VOCAB.image_codes(page.segments[i].tokens).tolist() for i in (0, 2)]
  assert codes == [[0, 15, 0, 0], [3, 15, 3, 3]]


def test_long_captions_lose_their_end(raw, text_tokenizer, tmp_path):
  whole = encode(raw, text_tokenizer, tmp_path / "whole")["train"]
  cut = encode(raw, text_tokenizer, tmp_path / "cut", max_caption_tokens=3)["train"]
  assert whole["longest_caption"] == cut["longest_caption"] > 3
  assert (cut["captions_cut"], cut["caption_tokens"]) == (15, 45)
  a, b = (
    DocumentStore(tmp_path / name / "train_pairs", VOCAB)[0].segments[0].tokens
    for name in ("whole", "cut")
  )
  assert b.tolist() == a[:3].tolist()


def test_a_lost_shard_is_encoded_again_and_the_stage_is_the_same(raw, text_tokenizer, tmp_path):
  """After the shard that a message names is deleted, the run must still be usable."""
  folder, ids = tmp_path / "documents", []
  for lost in ("", "000000.array_record", "000000.npz", "lengths.npy", "index.json"):
    if lost:
      (folder / "train_pairs" / lost).unlink()
      (folder / stages.DONE).unlink()
    with stages.once(folder, {}, files=table.STAGES["documents"].files):
      encode(raw, text_tokenizer, folder)
    ids.append(stages.require(tmp_path, "documents")["id"])
    store = DocumentStore(folder / "train_pairs", VOCAB)
    assert len([store[i] for i in range(len(store))]) == 15
  assert len(set(ids)) == 1


def test_codes_outside_the_vocabulary_and_one_code_for_all_images_are_refused(
  raw, text_tokenizer, tmp_path
):
  """A tokenizer with NaN parameters has one code for all images, so a second code is required."""
  for levels, facts in ((17, ("config.vocab.image_size", "16")), (1, ("same code",))):
    with refused(UserError, *facts):
      encode(raw, text_tokenizer, tmp_path, levels=levels)
  assert encode(raw, text_tokenizer, tmp_path / "two", levels=2)["train"]["codes_used"] == 2


def test_an_empty_training_split_is_refused(raw, text_tokenizer, tmp_path):
  index = json.loads((raw / reader.INDEX).read_text())
  index["shards"]["000000"] |= {"train_pairs": 0, "train_texts": 0, "train_interleaved": 0}
  (raw / reader.INDEX).write_text(json.dumps(index))
  with refused(UserError, "'train'"):
    encode(raw, text_tokenizer, tmp_path)


@pytest.mark.parametrize(
  ("counts", "used", "bits", "perplexity"),
  [
    ([2, 2, 0, 0], 2, 1.0, 2.0),
    ([5, 0], 1, 0.0, 1.0),
    ([3] * 8, 8, 3.0, 8.0),
    ([0, 0], 0, 0.0, 1.0),
  ],
)
def test_code_usage_literals(counts, used, bits, perplexity):
  expected = {"codes_used": used, "code_entropy_bits": bits, "code_perplexity": perplexity}
  assert code_usage(np.array(counts)) == expected

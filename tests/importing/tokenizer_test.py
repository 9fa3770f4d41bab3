import json

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest
import tokenizers

from cm3leon_jax.config.tokenizers import TextTokenizerConfig
from cm3leon_jax.errors import UserError
from cm3leon_jax.importing.tokenizer import read_tokenizer, rewrite
from cm3leon_jax.tokenizers.text import TextTokenizer, save_tokenizer
from cm3leon_jax.vocab import VocabLayout
from tests.importing import published
from tests.refusals import refused

IDS = {i: 32 + i for i in range(published.ROWS)}
VOCAB = VocabLayout(num_special=32, text_size=32 + published.ROWS, image_size=16)


def with_token(number) -> dict:
  """Returns a change of tokenizer.json that adds a token with the id `number`."""
  return {"model": lambda model: {"vocab": {**model["vocab"], "zzz": number}}}


def split_by(pattern: str) -> dict:
  """Returns a pre-tokenizer that splits by a regular expression, and then into bytes."""
  options = {"add_prefix_space": False, "trim_offsets": True, "use_regex": False}
  split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
  return {"type": "Sequence", "pretokenizers": [split, {"type": "ByteLevel", **options}]}


@pytest.fixture(scope="module", params=["qwen", "gpt2"])
def rewritten(request, tmp_path_factory):
  """Returns (source tokenizer, folder of the rewritten tokenizer, notes on differences)."""
  source = tmp_path_factory.mktemp("source")
  original = published.save_tokenizer(source, gpt2=request.param == "gpt2")
  made, notes = rewrite(read_tokenizer(source, published.ROWS), IDS, VOCAB)
  folder = tmp_path_factory.mktemp("text_tokenizer")
  save_tokenizer(made, VOCAB, TextTokenizerConfig(), folder)
  return original, folder, notes


@pytest.fixture(scope="module")
def tokenizer(rewritten):
  return TextTokenizer(rewritten[1], VOCAB)


@pytest.mark.parametrize(
  "text", ["a red bell left of 3 roads", "word12's\n\n  naïve cafés!", "Blue,key\t\r\nx 世界 🙂"]
)
def test_ids_are_those_of_the_source_after_a_space(rewritten, tokenizer, text):
  expected = np.array(rewritten[0].encode(" " + text).ids)
  np.testing.assert_array_equal(tokenizer.encode(text) - VOCAB.num_special, expected)
  assert len(expected) < len(text.encode())  # Some merges apply.


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_decode_inverts_encode_for_every_text(tokenizer, text):
  ids = tokenizer.encode(text)
  assert tokenizer.decode(ids) == text
  assert ((ids >= VOCAB.num_special) & (ids < VOCAB.text_size)).all()


@pytest.mark.parametrize("typed", ["<pad>", "</s>", "<mask:3>", *published.ADDED, "<unused:475>"])
def test_special_tokens_in_data_are_plain_text(rewritten, tokenizer, typed):
  ids = tokenizer.encode(f"red {typed} bell{typed}")
  assert tokenizer.decode(ids) == f"red {typed} bell{typed}"
  added = VOCAB.num_special + published.TOKENS - len(published.ADDED)
  assert (ids >= VOCAB.num_special).all()
  assert (ids < added).all()


def test_tokens_keep_their_order_and_names_of_two_are_told_apart(rewritten):
  original, folder, notes = rewritten
  found = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
  for i in range(published.TOKENS):
    name = original.id_to_token(i)
    name = {"</s>": "<source:</s>>"}.get(name, name)
    assert found.id_to_token(VOCAB.num_special + i) == name
  assert found.id_to_token(VOCAB.text_size - 1) == "<unused:479>"
  assert [found.id_to_token(i) for i in range(32)] == VOCAB.special_tokens()
  assert any("1 added tokens, such as <think>" in note for note in notes)
  assert any("10 rows have no token" in note for note in notes)


@pytest.mark.parametrize(
  "change",
  [
    {"model": {"type": "WordPiece"}},
    {"model": {"byte_fallback": True}},
    {"model": {"end_of_word_suffix": "</w>"}},
    {"model": {"vocab": {"a": 0}}},
    {"decoder": None},
    {"pre_tokenizer": None},
    {"normalizer": {"type": "Lowercase"}},
    {"added_tokens": [{"id": 480, "content": "<a>"}]},
    {"added_tokens": [{}]},
    {"added_tokens": [3]},
    {"decoder": 3},
    {"decoder": {"type": "Sequence", "decoders": 3}},
    {"model": {"vocab": 3}},
    {"model": {"vocab": {"a": None}}},
    {"model": 3},
    {"added_tokens": [{"id": 470, "content": "!"}]},
    {"model": {"merges": [["q", "zz"]]}},
    with_token(-1),
    with_token("5"),
    with_token(469.5),
    with_token(float("inf")),
    with_token(3),
    {"added_tokens": [{"id": 3, "content": "other"}]},
    {"added_tokens": [{"id": 475, "content": ""}]},
    {"pre_tokenizer": split_by("a|" * 5_001)},
    {"pre_tokenizer": split_by("(")},
  ],
)
def test_other_tokenizers_are_refused(change, tmp_path):
  published.save_tokenizer(tmp_path)
  path = tmp_path / "tokenizer.json"
  described = json.loads(path.read_text())
  for name, value in change.items():
    if callable(value):
      value = value(described[name])
    described[name] = described[name] | value if name == "model" and value != 3 else value
  path.write_text(json.dumps(described))
  with refused(UserError, "tokenizer.json"):
    rewrite(read_tokenizer(tmp_path, published.ROWS), IDS, VOCAB)
  path.unlink()
  with refused(UserError, str(path)):
    read_tokenizer(tmp_path, published.ROWS)


def test_a_pattern_that_tries_too_many_ways_ends_with_a_sentence(tmp_path):
  """Given such a pattern, `tokenizers` panics, and a panic is not an `Exception`."""
  published.save_tokenizer(tmp_path)
  path = tmp_path / "tokenizer.json"
  described = json.loads(path.read_text()) | {"pre_tokenizer": split_by("(a+)+$")}
  path.write_text(json.dumps(described))
  made, _ = rewrite(read_tokenizer(tmp_path, published.ROWS), IDS, VOCAB)
  save_tokenizer(made, VOCAB, TextTokenizerConfig(), tmp_path)
  tokenizer = TextTokenizer(tmp_path, VOCAB)
  assert tokenizer.decode(tokenizer.encode("a red bell")) == "a red bell"
  for encode, texts in (
    (tokenizer.encode, "a" * 60 + "!"),
    (tokenizer.encode_batch, ["a" * 60 + "!"]),
  ):
    with refused(UserError, "text"):
      encode(texts)

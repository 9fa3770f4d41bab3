import json

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest
import transformers

from cm3leon_jax.config.tokenizers import TextTokenizerConfig
from cm3leon_jax.errors import UserError
from cm3leon_jax.stages import stages, table
from cm3leon_jax.tokenizers.text import TextTokenizer, train_text_tokenizer
from cm3leon_jax.vocab import VocabLayout
from tests.refusals import refused

VOCAB = VocabLayout(num_special=8, text_size=300, image_size=16)
TEXTS = [
  f"a {color} {thing} beside the {other}"
  for color in ("red", "green", "blue")
  for thing in ("heart", "square", "house")
  for other in ("tree", "river", "road")
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp("text_tokenizer")
  train_text_tokenizer(TEXTS, VOCAB, TextTokenizerConfig(), path)
  return path


@pytest.fixture(scope="module")
def tokenizer(folder):
  return TextTokenizer(folder, VOCAB)


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_decode_inverts_encode_for_every_text(tokenizer, text):
  ids = tokenizer.encode(text)
  assert ids.dtype == np.int32
  assert tokenizer.decode(ids) == text
  assert ((ids >= VOCAB.num_special) & (ids < VOCAB.text_size)).all()


@pytest.mark.parametrize("typed", VOCAB.special_tokens())
def test_special_tokens_in_data_are_plain_text(tokenizer, folder, typed):
  text = f"red {typed} heart{typed}"
  ids = tokenizer.encode(text)
  assert (ids >= VOCAB.num_special).all()
  assert tokenizer.decode(ids) == text
  auto = transformers.AutoTokenizer.from_pretrained(folder)
  control = auto(text, add_special_tokens=False).input_ids
  assert VOCAB.special_tokens().index(typed) in control


def test_the_first_word_is_the_same_token_as_elsewhere(tokenizer):
  red, heart = tokenizer.encode("red").tolist(), tokenizer.encode("heart").tolist()
  assert tokenizer.encode("red heart").tolist() == red + heart
  assert tokenizer.encode("heart red").tolist() == heart + red


def test_batches_equal_single_texts(tokenizer):
  for text, ids in zip(["", *TEXTS], tokenizer.encode_batch(["", *TEXTS]), strict=True):
    assert ids.dtype == np.int32
    assert ids.tolist() == tokenizer.encode(text).tolist()


def test_transformers_loads_it(folder, tokenizer):
  auto = transformers.AutoTokenizer.from_pretrained(folder)
  assert len(auto) == VOCAB.text_size
  assert auto.convert_ids_to_tokens(list(range(VOCAB.num_special))) == VOCAB.special_tokens()
  found = [getattr(auto, f"{name}_token_id") for name in ("pad", "bos", "eos", "unk")]
  assert found == [VOCAB.pad, VOCAB.eos, VOCAB.eos, VOCAB.unk]
  assert auto.model_max_length == TextTokenizerConfig().model_max_length
  ids = auto("a red heart").input_ids
  assert ids == tokenizer.encode("a red heart").tolist()
  assert auto.decode(ids) == "a red heart"
  assert json.loads((folder / "special_tokens_map.json").read_text())["eos_token"] == "</s>"


def test_padding_and_truncation_of_a_file_change_no_ids(folder, tokenizer, tmp_path):
  described = json.loads((folder / "tokenizer.json").read_text())
  described["padding"] = {"strategy": {"Fixed": 99}, "direction": "Right", "pad_id": 0}
  described["padding"] |= {"pad_to_multiple_of": None, "pad_type_id": 0, "pad_token": "<pad>"}
  described["truncation"] = {"max_length": 1, "strategy": "LongestFirst", "stride": 0}
  described["truncation"]["direction"] = "Right"
  (tmp_path / "tokenizer.json").write_text(json.dumps(described))
  found = TextTokenizer(tmp_path, VOCAB)
  assert found.encode(TEXTS[0]).tolist() == tokenizer.encode(TEXTS[0]).tolist()


def test_another_vocabulary_is_refused(folder, tmp_path):
  for num_special, text_size in ((8, 301), (9, 300)):
    with refused(UserError, str(folder)):
      TextTokenizer(folder, VocabLayout(num_special, text_size, image_size=16))
  with refused(UserError, "absent"):
    TextTokenizer(tmp_path / "absent", VOCAB)


@pytest.mark.parametrize("content", ["{}", "", "[[[", '{"model": {"type": "BPE"}}'])
def test_a_file_that_is_no_tokenizer_is_refused_with_what_to_do(tmp_path, content):
  (tmp_path / "tokenizer.json").write_text(content)
  with refused(UserError, str(tmp_path)):
    TextTokenizer(tmp_path, VOCAB)
  (tmp_path / stages.DONE).write_text('{"id": "a"}')
  with refused(UserError, str(tmp_path)):
    TextTokenizer(tmp_path, VOCAB)


def test_the_same_texts_make_the_same_stage_and_a_damaged_file_is_refused(tmp_path):
  ids, files = [], table.STAGES["text_tokenizer"].files
  for name in "ab":
    folder = tmp_path / name / "text_tokenizer"
    with stages.once(folder, {}, files=files):
      train_text_tokenizer(TEXTS, VOCAB, TextTokenizerConfig(), folder)
    ids.append(stages.require(tmp_path / name, "text_tokenizer")["id"])
    TextTokenizer(folder, VOCAB)
  assert ids[0] == ids[1]
  path = folder / "tokenizer.json"
  path.write_text(path.read_text().replace("Ġ", "ġ", 1))
  with refused(UserError, str(folder)):
    TextTokenizer(folder, VOCAB)

import numpy as np
import pytest

from cm3leon_jax.config.tokenizers import TextTokenizerConfig
from cm3leon_jax.data.documents.store import Document, Segment
from cm3leon_jax.data.rows import loader
from cm3leon_jax.data.rows.sample_plan import SamplePlan
from cm3leon_jax.reports import row_text
from cm3leon_jax.tokenizers import text
from tests.data.stores import IMAGE_TOKENS, VOCAB, make_instructions, make_plan, make_sources


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  folder = tmp_path_factory.mktemp("text_tokenizer")
  # Has enough different words for a vocabulary of 512.
  words = [f"a red cat and dog word{i}" for i in range(300)] * 3
  text.train_text_tokenizer(words, VOCAB, TextTokenizerConfig(), folder)
  return text.TextTokenizer(folder, VOCAB)


def pair(tokens):
  image = Segment(True, VOCAB.image_ids(np.arange(IMAGE_TOKENS)))
  return Document("d", (Segment(False, tokens), image), "", "", "")


OWNERS = ["neighbor 1 'n'"] * 2 + ["document"] * 2


def test_a_sample_is_described_with_its_neighbor_and_infills(tokenizer):
  dog, cat = (pair(np.asarray(tokenizer.encode(words))) for words in ("a dog\x1b", "a red cat"))
  start = len(loader.join([dog], VOCAB))
  spans = ((start, start + len(cat.segments[0].tokens)), (start + 5, start + 9))
  length = len(loader.join([dog, cat], VOCAB)) + 6
  plan = SamplePlan((0,), False, spans, length)
  tokens = loader.build_sample(cat, [dog], plan, VOCAB, 1.0).tokens
  lines = row_text.sample_lines(tokens, OWNERS, VOCAB, tokenizer)
  assert lines[0] == "neighbor 1 'n': </s> 'a dog\\x1b' <break> <image 16 codes> <break>"
  assert lines[1].startswith("document: <mask:0> <break>")
  assert lines[1].endswith(" </s>")
  assert lines[2] == "infill: <mask:0> 'a red cat' <eoss>"
  assert lines[3] == "infill: <mask:1> <image 4 codes> <eoss>"
  for codes in row_text.sample_codes(tokens, VOCAB):
    assert codes.tolist() == [*range(IMAGE_TOKENS)]


def test_a_sample_without_its_caption_is_described(tokenizer):
  plan = SamplePlan((), True, (), 4 + IMAGE_TOKENS)
  tokens = loader.build_sample(pair(np.array([40])), [], plan, VOCAB, 1.0).tokens
  (line,) = row_text.sample_lines(tokens, ["document"] * 2, VOCAB, tokenizer)
  assert line == "document: </s> <mask:0> <break> <image 16 codes> </s>"
  (codes,) = row_text.sample_codes(tokens, VOCAB)
  assert codes.tolist() == [*range(IMAGE_TOKENS)]


@pytest.mark.parametrize("length", [128, 20])
def test_rows_of_every_kind_are_described(tmp_path, tokenizer, length):
  """Also rows that are full, so that samples lack their last tokens."""
  sources = make_sources(tmp_path)
  sources += make_instructions(tmp_path) if length > 100 else []
  for source in sources:
    source.share /= 2 if length > 100 else 1
  plan = make_plan(sources, sequence_length=length)
  rows = loader.RowLoader(plan, VOCAB)
  for number in range(40):
    lines, codes = row_text.describe_row(rows, number, tokenizer)
    used = sum(placement.num_positions for placement in plan.row(number))
    assert lines[0] == f"row {number}: {used} of {length} positions used"
    assert sum(line[:4].strip() != "" for line in lines) == 1 + len(plan.row(number))
    assert all(1 <= len(image) <= IMAGE_TOKENS for image in codes)


def test_a_sheet_has_a_line_per_row():
  black, gray = np.zeros((2, 2, 3), np.uint8), np.full((2, 2, 3), 9, np.uint8)
  sheet = row_text.contact_sheet([[], [gray, black]])
  assert sheet[::2, ::2, 0].tolist() == [[255, 255], [9, 0]]
  assert sheet.shape == (4, 4, 3)

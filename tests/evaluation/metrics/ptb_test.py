"""Tests the caption tokenizer against the output of the Java tokenizer."""

from hypothesis import given
from hypothesis import strategies as st
import pytest

from cm3leon_jax.evaluation.metrics import ptb
from tests.evaluation.ptb_captions import CAPTIONS


@pytest.mark.parametrize(("caption", "tokens"), CAPTIONS)
def test_tokens_are_those_of_java(caption, tokens):
  assert ptb.tokenize(caption) == tokens.split()


@pytest.mark.parametrize(
  ("caption", "tokens"),
  [
    ("a cat\na dog", "a cat a dog"),  # pycocoevalcap replaces line breaks.
    ("a b.\nThe end", "a b the end"),
    ("it&apos;s 5&nbsp;km&mdash;A&amp;B", "it 's 5 km a&b"),
    ("letter b. The letter b. the", "letter b the letter b. the"),
    ("No. 5, no. five", "no. 5 no five"),
    ("he is ill. In Decatur, Ill. and", "he is ill in decatur ill. and"),
  ],
)
def test_what_stands_around_a_word_matters(caption, tokens):
  assert ptb.tokenize(caption) == tokens.split()


@given(st.text())
def test_any_text_gives_tokens_in_lower_case_without_spaces(text):
  for token in ptb.tokenize(text):
    assert token == token.lower()
    assert token not in ptb.REMOVED
    assert token.split() == [token]

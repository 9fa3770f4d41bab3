"""Tests the caption tokenizer against the output of the Java tokenizer."""

import unicodedata

from hypothesis import given
from hypothesis import strategies as st
import pytest

from cm3leon_jax.evaluation.metrics import ptb
from tests.evaluation.ptb_captions import CAPTIONS

TEXTS = st.lists(st.sampled_from([caption for caption, _ in CAPTIONS])).map(" ".join)


@pytest.mark.parametrize(("caption", "tokens"), CAPTIONS)
def test_tokens_are_those_of_java(caption, tokens):
  assert ptb.tokenize(caption) == tokens.split()


def test_there_are_enough_captions_that_splitting_at_spaces_would_fail():
  assert len(CAPTIONS) >= 200
  naive = sum(caption.lower().rstrip(".").split() == tokens.split() for caption, tokens in CAPTIONS)
  assert naive < 0.2 * len(CAPTIONS)


def test_the_tokens_are_those_of_the_docstring():
  assert ptb.tokenize("A dog's bowl isn't empty (yet)...") == [
    "a", "dog", "'s", "bowl", "is", "n't", "empty", "-lrb-", "yet", "-rrb-"
  ]  # fmt: skip


@pytest.mark.parametrize("caption", ["", "   ", "...", "?", "\n", "“”", "😀", "- , . ; : ! ' \""])
def test_captions_without_words_have_no_tokens(caption):
  assert ptb.tokenize(caption) == []


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


@given(st.text(st.characters(categories=["Ll"], max_codepoint=0x24F), min_size=2, max_size=12))
def test_a_word_of_letters_is_itself(word):
  split = ("cannot", "gonna", "wanna", "gotta", "gimme", "lemme")
  assert ptb.tokenize(word) == ([word] if word not in split else [word[:3], word[3:]])
  assert all(unicodedata.category(char) == "Ll" for char in word)


@given(TEXTS)
def test_punctuation_at_the_end_changes_nothing(text):
  assert ptb.tokenize(f"{text} zebra .") == ptb.tokenize(f"{text} zebra")


@given(TEXTS)
def test_spaces_are_one_space(text):
  # Skips words with digits, because a double space changes "5  1/2" and "No.  5".
  words = [word for word in text.split() if not any(char.isdigit() for char in word)]
  assert ptb.tokenize("   ".join(words)) == ptb.tokenize(" ".join(words))

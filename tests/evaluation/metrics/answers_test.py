"""Tests VQA accuracy with its normalization of answers, exact match, and NDCG.

The literals cover each rule of vqaEval.py (GT-Vision-Lab/VQA).
"""

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from cm3leon_jax.errors import UserError
from cm3leon_jax.evaluation.metrics import answers as answer_metrics
from tests.refusals import refused


@pytest.mark.parametrize(
  ("answer", "normalized"),
  [
    ("The two dogs, arent they?", "2 dogs aren't they"),
    # Spaces.
    ("  red\n", "red"),
    ("red\tball", "red ball"),
    ("red\n\nball   x", "red ball x"),
    ("yes-\tno-one", "yes noone"),  # A tab counts as a space in the rules below.
    ("re?ally? ", "re ally"),  # A space at the end does not count.
    # Upper case.
    ("YES", "yes"),
    # A punctuation mark inside a word becomes a space.
    ("black/white", "black white"),
    ("t-shirt", "t shirt"),
    ("yes;no", "yes no"),
    ("x=y+z_w@v", "x y z w v"),
    ("[a]b{c}d(e)f", "b c d e f"),  # "a" has become an article.
    ("<b>`x`\\y", "b x y"),
    ('"stop"', "stop"),
    ("what?yes!no", "what yes no"),
    # If a mark is next to a space anywhere in the answer, all marks of this kind are removed.
    ("red, blue", "red blue"),
    ("red,blue, green", "redblue green"),
    ("yes - no-one", "yes noone"),
    ("yes -no-one", "yes noone"),
    # Each kind of mark has its own rule.
    ("yes - t-shirt/hat", "yes tshirt hat"),
    # The end of the answer does not count as a space.
    ("really?", "really"),
    ("re?ally?", "re ally"),
    # If there is a comma between digits, all marks are removed.
    ("1,000", "1000"),
    ("1,000-2,000", "10002000"),
    ("1,000 black/white", "1000 blackwhite"),
    ("1, 000/x", "1 000 x"),
    # These marks are not in the list of punctuation.
    ("10:30", "10:30"),
    ("dog's", "dog's"),
    ("$5 & 50%*#~^|", "$5 & 50%*#~^|"),
    # Only periods before a digit stay.
    ("2.5", "2.5"),
    (".5", ".5"),
    ("5.", "5"),
    ("5.x", "5x"),  # Removed because of a typo in the official pattern.
    ("U.S.A.", "usa"),
    ("x.5", "x.5"),
    ("yes. no", "yes no"),
    ("...", ""),
    # Only the first 32 periods are removed.
    ("x." * 34, "x" * 32 + "x.x."),
    # Numbers.
    ("none zero eleven someone", "0 0 eleven someone"),
    ("one two three four five six seven eight nine ten", "1 2 3 4 5 6 7 8 9 10"),
    ("Ten.", "10"),
    # Articles.
    ("a an the", ""),
    ("The cat on a mat in theater", "cat on mat in theater"),
    ("A+", ""),
    # Contractions.
    ("dont DONT don't cant wont isnt", "don't don't don't can't won't isn't"),
    # Words that lack one apostrophe.
    ("couldntve couldnt've couldn'tve", "couldntve couldn't've couldn't've"),
    ("itll oclock maam yall'd've twas", "it'll o'clock ma'am y'all'd've 'twas"),
    ("'ows'at ow's'at somebody'd", "'ow's'at 'ow's'at somebodyd"),
    # The official table has no "shes" or "lets". Its "Im" and "Ive" never match lower-case words.
    ("hes shes lets im ive", "he's shes lets im ive"),
    # Removing punctuation may join a number word to its neighbor, and it is then not recognized.
    ("one-two", "1 2"),
    ("one - two-three", "1 twothree"),
  ],
)
def test_answers_are_normalized(answer, normalized):
  assert answer_metrics.normalize(answer) == normalized


@pytest.mark.parametrize(
  ("matches", "accuracy"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (9, 1), (10, 1)]
)
def test_accuracy_is_the_mean_over_sets_of_nine(matches, accuracy):
  answers = [["yes"] * matches + ["no"] * (10 - matches)]
  assert answer_metrics.vqa_accuracies(["yes"], answers) == pytest.approx([accuracy])


@pytest.mark.parametrize(
  ("candidate", "answers", "accuracy"),
  [
    # Unanimous answers are compared without normalization.
    ("Yes", ["yes"] * 10, 0),
    ("yes.", ["yes"] * 10, 0),
    ("two", ["2"] * 10, 0),
    ("t-shirt", ["t-shirt"] * 10, 1),
    # Only white space around the answers is ignored.
    (" yes\n", ["yes"] * 10, 1),
    ("yes", ["yes", "yes "] * 5, 1),
    # If references differ, all answers are normalized, even if they are equal afterwards.
    ("Yes", ["yes"] * 9 + ["no"], 1),
    ("Yes", ["yes"] * 9 + ["Yes"], 1),
    ("two", ["2"] * 9 + ["3"], 1),
    ("T shirt", ["t-shirt"] * 9 + ["shirt"], 1),
    ("the cat", ["a cat"] * 2 + ["dog"] * 8, 0.6),
  ],
)
def test_answers_are_normalized_only_if_people_disagree(candidate, answers, accuracy):
  assert answer_metrics.vqa_accuracies([candidate], [answers]) == pytest.approx([accuracy])


def test_exact_match_is_normalized():
  answers = [["2", "three"]] * 5
  candidates = ["Two.", "3", "2", "three", "23"]
  found = answer_metrics.exact_matches(candidates, answers)
  assert found.tolist() == [1, 1, 1, 1, 0]
  # Exact match always normalizes, unlike VQA accuracy.
  assert answer_metrics.exact_matches(["Yes"], [["yes"]]).tolist() == [1]


@pytest.mark.parametrize(
  ("scores", "relevance", "value"),
  [
    ([3, 2, 1], [1, 0, 0], 1),
    ([1, 2, 3], [1, 0, 0], 0),  # One candidate is relevant, so only the first rank counts.
    ([2, 3, 1], [1, 0, 0], 0),
    ([2, 3, 1], [1, 0.2, 0], (0.2 + 1 / np.log2(3)) / (1 + 0.2 / np.log2(3))),
    ([-1, -2, -3], [1, 0.5, 0.2], 1),  # Scores are negative ranks.
    ([1, 1, 0], [1, 0, 0], 0.5),  # Two candidates share the first rank.
    ([0, 0, 0, 0], [1, 0, 0, 0], 0.25),
  ],
)
def test_ndcg(scores, relevance, value):
  assert answer_metrics.ndcg([scores], [relevance]) == pytest.approx([value])


def official_ndcg(scores, relevance):
  """Computes NDCG as defined by the Visual Dialog challenge. The scores must be distinct."""
  k = sum(value != 0 for value in relevance)
  ranked = sorted(range(len(scores)), key=lambda i: -scores[i])
  ideal = sorted(relevance, reverse=True)
  gain = sum(relevance[c] / np.log2(place + 2) for place, c in enumerate(ranked[:k]))
  return gain / sum(value / np.log2(place + 2) for place, value in enumerate(ideal[:k]))


def sample_dialogs(seed):
  rng = np.random.default_rng(seed)
  relevance = rng.choice([0, 0, 0, 0, 0.2, 0.5, 1], (20, 100))
  return rng.permuted(np.tile(np.arange(100.0), (20, 1)), axis=1), relevance


def test_ndcg_is_that_of_the_definition():
  scores, relevance = sample_dialogs(0)
  expected = [official_ndcg(*question) for question in zip(scores, relevance)]
  np.testing.assert_allclose(answer_metrics.ndcg(scores, relevance), expected, rtol=1e-12)
  # Negative control: scores are assigned to other candidates.
  assert np.abs(answer_metrics.ndcg(np.roll(scores, 1, 1), relevance) - expected).max() > 0.05


@given(st.integers(0, 2**32 - 1))
def test_the_order_of_candidates_and_the_scale_of_scores_do_not_matter(seed):
  scores, relevance = sample_dialogs(seed)
  scores = scores // 10  # Makes ties of ten candidates.
  found = answer_metrics.ndcg(scores, relevance)
  order = np.random.default_rng(seed).permutation(100)
  again = answer_metrics.ndcg(np.exp(scores[:, order] / 10), relevance[:, order])
  np.testing.assert_allclose(found, again, rtol=1e-9)
  best = answer_metrics.ndcg(relevance, relevance)
  np.testing.assert_allclose(best, 1, rtol=1e-12)
  assert (found <= 1 + 1e-12).all()


def test_a_score_that_is_nan_is_refused():
  with refused(UserError, "question 1", "NaN"):
    answer_metrics.ndcg([[3, 2], [1, np.nan]], [[0, 1], [1, 0]])

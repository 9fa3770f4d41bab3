"""Scores answers to questions about images: VQA accuracy, exact match, NDCG.

Each metric is one number per question, so that `intervals.mean_interval` can resample it.
"""

# n questions, C candidates.

from collections.abc import Sequence
import re

import numpy as np
import numpy.typing as npt

from cm3leon_jax.errors import UserError

NUMBERS = {
  "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5",
  "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
PERIOD = re.compile(r"\.(?!\d)")
MAX_PERIODS = 32
COMMA_IN_NUMBER = re.compile(r"\d,\d")
# The table of the official VQA code, without the upper-case keys, which that code never matches.
CONTRACTIONS = (
  "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't"
  " haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't"
  " mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've"
  " should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've"
  " someone'll someone's something'd something'd've something'll that's there'd there'd've"
  " there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't"
  " what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's"
  " who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've"
  " you'd you'd've you'll you're you've"
)


# Spellings of contractions that lack one apostrophe, such as "hed've" and "he'dve" for "he'd've".
SPELLINGS = {
  word[:i] + word[i + 1 :]: word
  for word in CONTRACTIONS.split()
  for i, char in enumerate(word)
  if char == "'"
} | {"somebody'd": "somebodyd"}  # This spelling is from the official table.


def normalize(answer: str) -> str:
  """Normalizes an answer as the official code of VQA does (GT-Vision-Lab/VQA, vqaEval.py).

    normalize("The two dogs, arent they?") = "2 dogs aren't they"

  In this order:
  1. Line breaks and tabs become spaces. Spaces at both ends are removed.
  2. If a sign of `PUNCTUATION` is next to a space anywhere, or if the answer has a comma between
     digits, all occurrences of the sign are removed. Otherwise they become spaces. Examples:
     "1,000-2,000" becomes "10002000", "black/white" becomes "black white", and "yes / no-one"
     becomes "yes no one".
  3. Periods before digits stay, and other periods are removed: ".5" stays, "5." becomes "5". The
     official pattern was meant to keep periods after digits, too, but it has a typo. At most 32
     periods are removed, because the official code passes a flag where the count is expected.
  4. Letters become lower case, "none" to "ten" become digits, articles are removed, and spellings
     in `SPELLINGS` are corrected. Apostrophes and colons stay.
  """
  text = _clean(answer)
  numeric = COMMA_IN_NUMBER.search(text)
  result = text
  for sign in PUNCTUATION:
    beside_space = f"{sign} " in text or f" {sign}" in text
    result = result.replace(sign, "" if numeric or beside_space else " ")
  result = PERIOD.sub("", result, count=MAX_PERIODS)
  words = [NUMBERS.get(word, word) for word in result.lower().split()]
  return " ".join(SPELLINGS.get(word, word) for word in words if word not in ARTICLES)


def _clean(answer: str) -> str:
  """Replaces line breaks and tabs by spaces, and removes spaces at both ends."""
  return answer.replace("\n", " ").replace("\t", " ").strip()


def vqa_accuracies(candidates: Sequence[str], answers: Sequence[Sequence[str]]) -> np.ndarray:
  """Computes the VQA accuracy of each answer (Antol et al. 2015; Goyal et al. 2017).

    candidates = ["two"], answers = [["2", "2", "two", *7 * ["3"]]]
    result = [0.9]

  The metric leaves out each person once and computes min(1, matches / 3), where `matches` is the
  number of other people who gave the answer of the candidate. The result is the mean over the
  people. It is 1 if at least four people gave this answer.

  As in the official code, answers are normalized only if the people disagree. If all people gave
  the same answer, the candidate must equal it exactly: "Yes" is wrong if all people wrote "yes".
  VQA has 10 answers per question. Returns [n] fp64 from 0 to 1, whose mean is the accuracy.
  """
  values = []
  for candidate, given in zip(candidates, answers, strict=True):
    candidate, given = _clean(candidate), [_clean(answer) for answer in given]
    if len(set(given)) > 1:
      candidate, given = normalize(candidate), [normalize(answer) for answer in given]
    same = np.array([answer == candidate for answer in given])
    values.append(np.minimum(1, (same.sum() - same) / 3).mean())
  return np.array(values, np.float64)


def exact_matches(candidates: Sequence[str], answers: Sequence[Sequence[str]]) -> np.ndarray:
  """Returns 1 for each candidate that equals an answer of a person, and 0 for the others.

    exact_matches(["Two."], [["2", "three"]]) = [1.0]

  All answers are normalized, even if the people agree. Returns [n] fp64, whose mean is the share of
  exact matches.
  """
  pairs = zip(candidates, answers, strict=True)
  return np.array([normalize(one) in map(normalize, given) for one, given in pairs], np.float64)


def ndcg(scores: npt.ArrayLike, relevance: npt.ArrayLike) -> np.ndarray:
  """Computes the normalized discounted cumulative gain of each question (Visual Dialog, 2018).

    scores = [[3, 2, 1, 0]], relevance = [[0.0, 1.0, 0.0, 0.5]]
    result = [0.480]: 1 / log2(3), divided by 1 / log2(2) + 0.5 / log2(3)

  The gain is summed over the k candidates with the highest scores, where k is the number of
  candidates with a relevance above 0. Candidates with equal scores share the mean of their
  discounts, so that their order does not matter. The official code orders them arbitrarily. Scores
  and relevance are [n, C], and relevance is from 0 to 1. To use ranks, of which 1 is best, pass
  their negatives as scores. Returns [n] fp64 from 0 to 1, whose mean is the NDCG of the model.

  Raises:
    UserError: a score is NaN, which would count as the lowest.
  """
  scores, relevance = np.asarray(scores, np.float64), np.asarray(relevance, np.float64)
  if np.isnan(scores).any():
    raise UserError(f"question {np.isnan(scores).any(1).argmax()} has a score that is NaN.")
  pairs = zip(scores, relevance, strict=True)
  return np.array([_ndcg(*question) for question in pairs], np.float64)


def _ndcg(scores: np.ndarray, relevance: np.ndarray) -> float:
  """Computes the NDCG of one question. Both arguments have the shape [C]."""
  places = np.arange(len(scores))
  discounts = np.where(places < np.count_nonzero(relevance), 1 / np.log2(places + 2), 0)
  _, levels = np.unique(-scores, return_inverse=True)  # Level 0 is the highest score.
  shared = np.bincount(levels, discounts[np.argsort(np.argsort(-scores))]) / np.bincount(levels)
  best = np.sort(relevance)[::-1]
  return float((relevance * shared[levels]).sum() / (best * discounts).sum())

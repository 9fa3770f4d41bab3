import dataclasses
import shutil

import numpy as np
import pytest

from cm3leon_jax.data.published.examples import Example
from cm3leon_jax.errors import UserError
from cm3leon_jax.evaluation.protocols import metrics
from cm3leon_jax.evaluation.protocols.metrics import ColumnSamples
from tests.refusals import refused

REFERENCES = [
  ("a red cat on a mat", "the cat is red"),
  ("two dogs in the snow", "dogs run through snow"),
  ("a bowl of green soup", "some soup in a bowl"),
  ("an old house by the sea", "the house is near the sea"),
]


def column(texts, references=REFERENCES, groups=None, **fields) -> ColumnSamples:
  examples = [
    Example(str(i), str(i), references=tuple(given), **{k: v[i] for k, v in fields.items()})
    for i, given in enumerate(references)
  ]
  lines = [{"text": text} for text in texts]
  groups = [example.group for example in examples] if groups is None else groups
  return ColumnSamples(groups, lines, examples, num_resamples=200)


@pytest.mark.skipif(not shutil.which("java"), reason="needs Java")
def test_captions_of_people_score_higher_than_those_of_other_images():
  right = column([given[0] for given in REFERENCES], [given[1:] for given in REFERENCES])
  texts = [given[0] for given in REFERENCES]
  wrong = column(texts[1:] + texts[:1], [given[1:] for given in REFERENCES])
  for metric in (metrics.cider, metrics.bleu4):
    assert metric(right)["value"] > 3 * metric(wrong)["value"]


@pytest.mark.skipif(not shutil.which("java"), reason="needs Java")
def test_bleu_is_that_of_a_corpus_times_100():
  texts = ["a red cat on a mat", "two dogs", "green soup in a bowl", "a house"]
  # Clipped matches of 1-grams to 4-grams, and the penalty for 15 words instead of 21.
  precisions = [14 / 15, 10 / 11, 6 / 7, 4 / 5]
  expected = 100 * np.exp(1 - 21 / 15) * np.prod(precisions) ** (1 / 4)
  assert metrics.bleu4(column(texts))["value"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.skipif(not shutil.which("java"), reason="needs Java")
def test_a_line_separator_in_a_text_moves_no_text_to_another_example(monkeypatch):
  texts = ["a red cat on a mat", "two dogs", "green soup in a bowl", "a house"]
  separated = [text.replace(" ", "\u2028") for text in texts]
  assert metrics.bleu4(column(separated)) == metrics.bleu4(column(texts))
  monkeypatch.setattr(metrics.shutil, "which", lambda name: None)
  with refused(UserError, "java"):
    metrics.bleu4(column(texts))


def test_answers_count_by_what_people_said():
  given = [("two",) * 9 + ("3",), ("a cat",) * 2 + ("dog",) * 8, ("yes",) * 10]
  answers = column(["2", "cat", "no"], given)
  assert metrics.measure("vqa_accuracy", answers)["value"] == pytest.approx(160 / 3)
  assert metrics.measure("exact_match", answers)["value"] == pytest.approx(200 / 3)


def test_candidates_are_ranked_by_their_scores():
  good = column(["", ""], [("x",)] * 2, relevance=[(0.0, 1.0, 0.5), (1.0, 0.0, 0.0)])
  best = [np.array([-9.0, -1.0, -2.0]), np.array([-1.0, -5.0, -5.0])]
  worst = [-x for x in best]
  found = [metrics.ndcg(dataclasses.replace(good, inputs={"candidates": x})) for x in (best, worst)]
  assert found[0]["value"] == pytest.approx(100)
  assert found[1]["value"] < 50

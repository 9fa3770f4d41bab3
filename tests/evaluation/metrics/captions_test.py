"""Tests BLEU and CIDEr against pycocoevalcap."""

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
import pytest

from cm3leon_jax.config import UserError
from cm3leon_jax.evaluation.metrics import captions as caption_metrics
from cm3leon_jax.evaluation.metrics import ptb
from tests.evaluation.ptb_captions import CAPTIONS
from tests.refusals import refused

WORDS = "a the man dog red ball on grass runs sits near tree big two with cat".split()  # noqa: SIM905
CAPTION = st.lists(st.sampled_from(WORDS[:5]), max_size=8)
REFERENCES = st.lists(CAPTION.filter(bool), min_size=1, max_size=4)
IMAGES = st.lists(st.tuples(CAPTION, REFERENCES), min_size=1, max_size=5)
EXACT = {"rel": 1e-9, "abs": 1e-9}


def sample(seed: int, images: int = 60):
  """Draws captions that share phrases with their references; some are short or empty."""
  rng = np.random.default_rng(seed)
  weights = 1 / np.arange(1, len(WORDS) + 1)

  def caption(length):
    return [str(word) for word in rng.choice(WORDS, length, p=weights / weights.sum())]

  candidates, references = [], []
  for i in range(images):
    others = [caption(rng.integers(1, 14)) for _ in range(rng.integers(1, 6))]
    chosen = list(others[0])
    for place in range(len(chosen)):
      if rng.random() < 0.2:
        chosen[place] = str(rng.choice(WORDS))
    candidates.append(chosen[: rng.integers(0, 14)] if i % 3 else chosen + caption(2))
    references.append(others)
  return [[], ["cat"], *candidates], [[["a", "cat"]], [["cat"], ["dog"]], *references]


def official(candidates, references):
  """Runs pycocoevalcap; returns BLEU [N] of all, BLEU [n, N] of each image, and CIDEr likewise."""
  texts = {i: [" ".join(caption)] for i, caption in enumerate(candidates)}
  others = {i: [" ".join(one) for one in some] for i, some in enumerate(references)}
  bleu, bleus = Bleu(4).compute_score(others, texts, verbose=0)
  cider, ciders = Cider().compute_score(others, texts)
  return np.array(bleu), np.array(bleus).T, cider, ciders


@pytest.mark.parametrize("seed", range(5))
def test_scores_are_those_of_pycocoevalcap(seed):
  candidates, references = sample(seed)
  bleu, bleus, cider, ciders = official(candidates, references)
  counts = caption_metrics.bleu_counts(candidates, references)
  assert 0.05 < bleu[3] < bleu[0] < 0.95
  np.testing.assert_allclose(caption_metrics.bleu(counts.sum(0)), bleu, rtol=1e-9, atol=1e-9)
  np.testing.assert_allclose(caption_metrics.bleu(counts), bleus, rtol=1e-9, atol=1e-9)
  found = caption_metrics.cider(candidates, references)
  assert 0.5 < cider < 9.5
  np.testing.assert_allclose(found, ciders, rtol=1e-9, atol=1e-9)
  assert found.mean() == pytest.approx(cider, **EXACT)


def test_the_comparison_notices_swapped_references():
  candidates, references = sample(0)
  bleu, bleus, cider, ciders = official(candidates, references)
  swapped = references[1:] + references[:1]
  counts = caption_metrics.bleu_counts(candidates, swapped)
  found = caption_metrics.cider(candidates, swapped)
  assert np.abs(caption_metrics.bleu(counts.sum(0)) - bleu).min() > 0.05
  assert np.abs(caption_metrics.bleu(counts) - bleus).max() > 0.5
  assert abs(found.mean() - cider) > 0.5
  assert np.abs(found - ciders).max() > 1


def test_texts_are_tokenized_and_scored_as_by_pycocoevalcap():
  candidates, first, second = CAPTIONS[::3], CAPTIONS[1::3], CAPTIONS[2::3]
  # For half of the images, the candidate equals a reference.
  images = [
    [*two, one][: 2 + i % 2] for i, (one, *two) in enumerate(zip(candidates, first, second))
  ]
  captions = [text for text, _ in candidates]
  references = [[text for text, _ in image] for image in images]
  expected = [tokens.split() for _, tokens in candidates]
  others = [[tokens.split() for _, tokens in image] for image in images]
  bleu, bleus, cider, ciders = official(expected, others)
  tokens = [[ptb.tokenize(text) for text in texts] for texts in (captions, *references)]
  counts = caption_metrics.bleu_counts(tokens[0], tokens[1:])
  np.testing.assert_allclose(caption_metrics.bleu(counts.sum(0)), bleu, rtol=1e-9, atol=1e-9)
  np.testing.assert_allclose(caption_metrics.bleu(counts), bleus, rtol=1e-9, atol=1e-9)
  found = caption_metrics.cider(tokens[0], tokens[1:])
  np.testing.assert_allclose(found, ciders, rtol=1e-9, atol=1e-9)
  assert found.mean() == pytest.approx(cider, **EXACT)


def test_the_counts_and_scores_are_those_of_the_docstrings():
  counts = caption_metrics.bleu_counts(
    [["the", "cat", "the"]], [[["the", "cat", "sat"], ["a", "cat"]]]
  )
  assert counts.tolist() == [[2, 1, 0, 0, 3, 2, 1, 0, 3]]
  found = caption_metrics.bleu(counts[0])
  np.testing.assert_allclose(found, [0.667, 0.577, 0, 0], atol=6e-4)
  ciders = caption_metrics.cider([["a", "cat"], ["a", "dog"]], [[["a", "cat"]], [["the", "bird"]]])
  np.testing.assert_allclose(ciders, [5, 0])


def test_the_closest_reference_is_the_shorter_of_two_equally_close():
  references = [[["a"] * 6, ["a"] * 2, ["a"] * 9]]
  assert caption_metrics.bleu_counts([["a"] * 4], references)[0, -1] == 2
  assert caption_metrics.bleu_counts([["a"] * 8], references)[0, -1] == 9


def test_a_short_candidate_is_penalized():
  counts = caption_metrics.bleu_counts([["a", "b"]], [[["a", "b", "c", "d"]]])
  assert caption_metrics.bleu(counts[0])[0] == pytest.approx(np.exp(1 - 2))


def test_a_bootstrap_recomputes_the_scores_of_resamples():
  candidates, references = sample(1)
  counts = caption_metrics.bleu_counts(candidates, references)
  indices = np.random.default_rng(0).integers(0, len(counts), (3, len(counts)))
  found = caption_metrics.bleu(counts[indices].sum(1))
  for row, resample in zip(found, indices):
    again = caption_metrics.bleu_counts(
      [candidates[i] for i in resample], [references[i] for i in resample]
    )
    np.testing.assert_allclose(row, caption_metrics.bleu(again.sum(0)), rtol=1e-12)


@given(IMAGES, st.randoms())
def test_the_order_of_references_does_not_matter(images, random):
  candidates, references = zip(*images)
  shuffled = [random.sample(others, len(others)) for others in references]
  counts = caption_metrics.bleu_counts(candidates, references)
  assert (caption_metrics.bleu_counts(candidates, shuffled) == counts).all()
  np.testing.assert_allclose(
    caption_metrics.cider(candidates, shuffled),
    caption_metrics.cider(candidates, references),
    rtol=1e-9, atol=1e-9,
  )  # fmt: skip


@given(IMAGES)
def test_a_perfect_caption_scores_highest(images):
  candidates, references = zip(*images)
  single = [others[:1] for others in references]
  perfect = [others[0] for others in single]
  for metric in (caption_metrics.cider, lambda c, r: caption_metrics.bleu_counts(c, r)[:, 0]):
    assert (metric(perfect, single) >= metric(candidates, single) - 1e-9).all()
  best = caption_metrics.bleu(caption_metrics.bleu_counts(perfect, references))
  long = np.array([len(caption) >= 4 for caption in perfect])
  np.testing.assert_allclose(best[long], 1, atol=1e-6)


@given(IMAGES)
def test_empty_candidates_score_0(images):
  references = [others for _, others in images]
  empty = [[] for _ in references]
  counts = caption_metrics.bleu_counts(empty, references)
  assert caption_metrics.bleu(counts).max() == 0
  assert caption_metrics.bleu(counts.sum(0)).max() == 0
  assert caption_metrics.cider(empty, references).max() == 0


def test_ngrams_of_all_images_weigh_nothing():
  references = [[["a", "cat"]], [["a", "dog"]]]
  assert caption_metrics.cider([["a"], ["a"]], references).max() == 0
  assert caption_metrics.cider([["cat"], ["dog"]], references).min() > 0


@pytest.mark.parametrize(
  ("captions", "references"),
  [([["a"]], [[["a"]], [["b"]]]), ([], []), ([["a"], ["b"]], [[["a"]], []])],
)
@pytest.mark.parametrize("metric", [caption_metrics.bleu_counts, caption_metrics.cider])
def test_wrong_inputs_are_named(metric, captions, references):
  with refused(UserError):
    metric(captions, references)

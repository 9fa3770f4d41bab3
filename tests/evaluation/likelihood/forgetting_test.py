"""Tests the comparison of a tuned model with its base on the same held-out documents."""

import dataclasses

import jax
import numpy as np
import pytest

from cm3leon_jax.data.documents.store import DocumentStore
from cm3leon_jax.evaluation.likelihood import bits, forgetting
from cm3leon_jax.evaluation.likelihood.forgetting import Measured
from cm3leon_jax.retrieval.neighbors import load_neighbors
from cm3leon_jax.run.base_documents import Base
from cm3leon_jax.run.run import Run
from tests.data.stores import VOCAB
from tests.models.tiny import random_params
from tests.training.watch.heldout_test import mesh, settings, workdir  # noqa: F401

TOKENS = {"image": np.array([4, 4]), "text": np.array([0, 2])}
BEFORE = Measured(
  {"image": np.array([8.0, 4.0]), "text": np.array([0.0, 3.0])}, TOKENS, ["fox", "cat"],
  [True, True, False, True], ["a", "b", "c", "d"],
)  # fmt: skip
AFTER = dataclasses.replace(
  BEFORE, bits={"image": np.array([9.0, 6.0]), "text": np.array([0.0, 3.0])},
  correct=[True, False, False, False],
)  # fmt: skip


def test_a_rise_is_the_share_of_all_bits_before():
  found = forgetting.compare(BEFORE, AFTER)
  image = found["image"]
  assert (image["before"], image["after"], image["documents"]) == (1.5, 1.875, 2)
  assert image["rise"] == pytest.approx(3 / 12)
  # Of the two concepts, one rises by 1 / 8 and the other by 2 / 4.
  assert image["low"] == pytest.approx(1 / 8)
  assert image["high"] == pytest.approx(2 / 4)
  assert (found["text"]["rise"], found["text"]["documents"]) == (0, 1)
  assert found["correct"]["change"] == -0.5
  assert found["correct"]["low"] < -0.5 < found["correct"]["high"] <= 0


def test_equal_models_forget_nothing_and_a_model_without_a_judge_has_bits_only():
  found = forgetting.compare(BEFORE, BEFORE)
  assert (found["image"]["low"], found["image"]["high"]) == (0, 0)
  assert (found["correct"]["low"], found["correct"]["high"]) == (0, 0)
  plain = dataclasses.replace(BEFORE, correct=(), captions=())
  assert "correct" not in forgetting.compare(plain, plain)


def test_only_captions_with_facts_are_judged(settings, workdir, mesh):  # noqa: F811
  run, params = Run(workdir, settings), random_params(settings.model)
  for judge in (None, lambda image, facts: ""):  # The documents of this base have no facts.
    found = forgetting.measure(run, params, Base(settings, workdir), judge)
    assert found.bits["image"].sum() > 0
    assert found.correct == ()


def test_the_bits_are_those_of_an_evaluation_with_true_neighbors(settings, workdir, mesh):  # noqa: F811
  params = random_params(settings.model)
  run = Run(workdir, settings)
  found = forgetting.measure(run, params, Base(settings, workdir))
  stores = [
    DocumentStore(workdir / "documents" / f"{split}_pairs", VOCAB) for split in ("train", "heldout")
  ]
  ids = load_neighbors(workdir / "neighbors", "heldout_pairs", True)
  expected = bits.evaluate(
    params, settings.model, *stores, ids, VOCAB, settings.data, settings.evaluation, settings.seed
  )
  for modality in bits.MODALITIES:
    total = found.bits[modality].sum() / found.tokens[modality].sum()
    assert total == pytest.approx(expected[modality]["true"]["bits"], rel=1e-6)
  other = forgetting.measure(run, jax.tree.map(lambda x: 0.5 * x, params), Base(settings, workdir))
  rise = forgetting.compare(found, other)["image"]["rise"]
  assert rise != 0

import dataclasses

import numpy as np
import pytest

from cm3leon_jax.config import UserError
from cm3leon_jax.data.documents.store import Document, DocumentStore, Segment, write_documents
from cm3leon_jax.data.instructions import samples
from cm3leon_jax.data.instructions.config import InstructionTask
from cm3leon_jax.data.instructions.tasks import mixture
from cm3leon_jax.data.rows.config import DataConfig
from cm3leon_jax.data.rows.loader import RowLoader
from cm3leon_jax.data.rows.plan import RowPlan, RowSource
from tests.data.stores import VOCAB, make_sources
from tests.refusals import refused

ANSWERS = 30
CONFIG = DataConfig(sequence_length=64, pack_window=32, text_share=0.0)


def text(rng, size):
  ids = rng.integers(VOCAB.num_special, VOCAB.text_size, size)
  return Segment(False, ids.astype(np.int32))


def image(rng):
  return Segment(True, VOCAB.image_ids(rng.integers(0, VOCAB.image_size, 4)))


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
  root, rng = tmp_path_factory.mktemp("stores"), np.random.default_rng(0)
  answers, answer_targets, edits, edit_targets = [], [], [], []
  for i in range(ANSWERS):
    size = int(rng.integers(1, 4))
    answers.append(Document(f"a{i}", (text(rng, 6 + size), image(rng)), "", "", ""))
    answer_targets.append((5, 5 + size))
    segments = (text(rng, 2), image(rng), text(rng, 3), image(rng))
    edits.append(Document(f"e{i}", segments, "", "", ""))
    edit_targets.append((13, 17))
  found = []
  for name, documents, targets in (
    ("answers", answers, answer_targets),
    ("edits", edits, edit_targets),
  ):
    write_documents(root / name, documents, VOCAB)
    samples.write_targets(root / name, targets)
    store = DocumentStore(root / name, VOCAB)
    found.append((store, samples.read_targets(root / name, len(store))))
  return found


def sources_of(stores, loss_on="all", drops=(0.0, 0.0)):
  (answers, first), (edits, second) = stores
  return [
    RowSource(answers, 0.5, instructions=samples.Instructions(first, loss_on=loss_on)),
    RowSource(
      edits, 0.5, instructions=samples.Instructions(second, samples.Drops(*drops), loss_on)
    ),
  ]


def rows_of(sources, count=6, seed=0):
  loader = RowLoader(RowPlan(sources, CONFIG, VOCAB.num_masks, seed), VOCAB)
  return [loader[i] for i in range(count)]


def test_rows_hold_both_tasks_and_only_targets_count(stores):
  rows = rows_of(sources_of(stores, "target"))
  counted = np.concatenate([row["targets"][row["loss_weights"] > 0] for row in rows])
  assert set(np.unique(counted)) >= {VOCAB.eoss, VOCAB.eos}
  everything = rows_of(sources_of(stores, "all"))
  for row, full in zip(rows, everything):
    np.testing.assert_array_equal(row["inputs"], full["inputs"])
    assert 0 < row["loss_weights"].sum() < full["loss_weights"].sum()
    # All tokens of a span, from its sentinel to <eoss>, have a loss weight; the sentinel has none.
    for place in np.flatnonzero(row["targets"] == VOCAB.eoss):
      start = place
      while row["targets"][start] != VOCAB.mask(0):
        start -= 1
      assert row["loss_weights"][start + 1 : place + 1].all()
      assert row["loss_weights"][start] == 0


def test_a_row_depends_on_its_number_and_the_seed_alone(stores):
  sources = sources_of(stores, drops=(0.3, 0.3))
  first, again, other = (rows_of(sources, seed=seed) for seed in (0, 0, 1))
  loader = RowLoader(RowPlan(sources, CONFIG, VOCAB.num_masks, 0), VOCAB)
  for i in reversed(range(6)):
    np.testing.assert_array_equal(loader[i]["inputs"], first[i]["inputs"])
    np.testing.assert_array_equal(again[i]["loss_weights"], first[i]["loss_weights"])
  assert any((a["inputs"] != b["inputs"]).any() for a, b in zip(first, other))


def test_pairs_of_pretraining_may_be_mixed_in(stores, tmp_path):
  replay = dataclasses.replace(make_sources(tmp_path, num_pairs=20)[0], share=0.5)
  sources = [dataclasses.replace(source, share=0.25) for source in sources_of(stores)]
  plan = RowPlan([*sources, replay], CONFIG, VOCAB.num_masks, 0)
  placements = [p for window in range(3) for row in plan.window(window) for p in row]
  filled = np.bincount([p.source for p in placements], [p.num_positions for p in placements])
  np.testing.assert_allclose(filled / filled.sum(), [0.25, 0.25, 0.5], atol=0.05)


def test_samples_lack_all_or_the_instruction_as_often_as_asked():
  lengths, is_image, drops = [2, 16, 3, 16], [False, True, False, True], samples.Drops(0.3, 0.2)
  kinds = {"all": 0, "instruction": 0, "nothing": 0}
  for seed in range(2_000):
    rng = np.random.default_rng(seed)
    plan = samples.plan_instruction(lengths, is_image, (25, 41), rng, drops)
    kinds["all" if plan.first else "instruction" if plan.skipped == 2 else "nothing"] += 1
  shares = {kind: count / 2_000 for kind, count in kinds.items()}
  expected = {"all": drops.all, "instruction": drops.instruction, "nothing": 0.5}
  # The tolerance is four standard errors of a share.
  assert shares == pytest.approx(expected, abs=0.04)


def test_targets_belong_to_their_store(stores, tmp_path):
  with refused(UserError):
    samples.read_targets(tmp_path, 3)
  samples.write_targets(tmp_path, [(1, 2)])
  with refused(UserError):
    samples.read_targets(tmp_path, 3)


def make_task(**fields):
  return InstructionTask(name="x", templates=("{a}",), target="a", format="jsonl", **fields)


def test_shares_follow_sizes_within_the_clipped_range():
  tasks = [make_task()] * 3
  assert mixture(tasks, [100, 1000, 100_000]) == pytest.approx([0.084, 0.084, 0.832], abs=1e-3)
  assert mixture(tasks, [10, 10, 10]) == pytest.approx([1 / 3] * 3)
  assert mixture(tasks[:2], [1, 10**9]) == pytest.approx([0.3 / 2.3, 2 / 2.3])
  twice = [make_task(weight=2.0), make_task()]
  assert mixture(twice, [10, 10]) == pytest.approx([2 / 3, 1 / 3])
  capped = [make_task(cap=10), make_task()]
  assert mixture(capped, [10_000, 10]) == pytest.approx([0.5, 0.5])
  with refused(UserError):
    mixture(tasks, [1, 0, 2])
  with refused(UserError):
    mixture([make_task(weight=0.0)], [3])

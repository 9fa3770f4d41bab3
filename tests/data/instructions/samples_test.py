import dataclasses

import numpy as np
import pytest

from cm3leon_jax.config.data import DataConfig
from cm3leon_jax.config.instructions import InstructionTask
from cm3leon_jax.data.documents.store import Document, Segment
from cm3leon_jax.data.instructions import samples
from cm3leon_jax.data.instructions.tasks import mixture
from cm3leon_jax.data.rows.loader import RowLoader
from cm3leon_jax.data.rows.plan import RowPlan
from cm3leon_jax.decoding.request import edit
from cm3leon_jax.errors import UserError
from tests.data.stores import VOCAB, make_instructions
from tests.refusals import refused

CONFIG = DataConfig(sequence_length=64, pack_window=32, text_share=0.0)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
  return make_instructions(tmp_path_factory.mktemp("stores"))


def rows_of(sources, count=6, seed=0):
  loader = RowLoader(RowPlan(sources, CONFIG, VOCAB, seed), VOCAB)
  return [loader[i] for i in range(count)]


def test_rows_hold_both_tasks_and_only_targets_count(tasks):
  only = [
    dataclasses.replace(task, instructions=dataclasses.replace(task.instructions, loss_on="target"))
    for task in tasks
  ]
  rows = rows_of(only)
  counted = np.concatenate([row["targets"][row["loss_weights"] > 0] for row in rows])
  assert set(np.unique(counted)) >= {VOCAB.eoss, VOCAB.eos}
  everything = rows_of(tasks)
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


def test_samples_lack_all_or_the_instruction_as_often_as_asked():
  lengths, is_image, drops = [2, 16, 3, 16], [False, True, False, True], samples.Drops(0.3, 0.2)
  kinds = {"all": 0, "instruction": 0, "nothing": 0}
  for seed in range(2_000):
    rng = np.random.default_rng(seed)
    plan = samples.plan_instruction(lengths, is_image, (25, 41), rng, drops, VOCAB)
    kinds["all" if plan.first else "instruction" if plan.skipped == (2,) else "nothing"] += 1
  shares = {kind: count / 2_000 for kind, count in kinds.items()}
  expected = {"all": drops.all, "instruction": drops.instruction, "nothing": 0.5}
  # The tolerance is four standard errors of a share.
  assert shares == pytest.approx(expected, abs=0.04)


@pytest.mark.parametrize("template", ["cm3leon", "chameleon"])
def test_every_plan_finds_its_target(template):
  """Targets are stored as ranges of the template cm3leon; tokens of a document are distinct."""
  vocab, rng = dataclasses.replace(VOCAB, template=template), np.random.default_rng(0)
  masked = set()
  for seed in range(300):
    count, first = int(rng.integers(1, 5)), vocab.num_special
    lengths, is_image = rng.integers(2, 6, count).tolist(), (rng.random(count) < 0.5).tolist()
    segments = []
    for n, image in zip(lengths, is_image):
      start = vocab.text_size if image else first
      segments.append(Segment(image, np.arange(start + first, start + first + n, dtype=np.int32)))
      first += n
    at = int(rng.integers(count))
    skip = int(rng.integers(2)) * (not is_image[at])
    begin = 1 + sum(lengths[:at]) + at + skip
    target = (begin, begin + lengths[at] - skip)
    document = Document("d", tuple(segments), "", "", "")
    plan = samples.plan_instruction(
      lengths, is_image, target, np.random.default_rng(seed), samples.Drops(0.3, 0.3), vocab
    )
    tokens, weights = samples.build_instruction(document, plan, vocab, "target")
    wanted = segments[at].tokens[skip:].tolist()
    after = tokens[1:][weights[1:] > 0][: len(wanted)].tolist()
    assert after == wanted
    masked.add((plan.masked, bool(plan.skipped), bool(plan.spans)))
  assert len(masked) == 4


@pytest.mark.parametrize(("template", "kept"), [("cm3leon", 3), ("chameleon", 2)])
def test_a_dropped_instruction_leaves_what_the_stream_of_an_edit_has(template, kept):
  """With the template chameleon, that is the images alone."""
  vocab = dataclasses.replace(VOCAB, template=template)
  rng, drops = np.random.default_rng(0), samples.Drops(instruction=1.0)
  segments, kinds = [np.full(2, vocab.num_special), vocab.image_ids([1])], [False, True] * 2
  parts = tuple(Segment(image, segments[image]) for image in kinds)
  plan = samples.plan_instruction([2, 1, 2, 1], kinds, (9, 10), rng, drops, vocab)
  tokens, _ = samples.build_instruction(Document("d", parts, "", "", ""), plan, vocab, "all")
  text, image = segments
  asked = edit(vocab, 1, text, image, text).streams[1]
  assert tokens.tolist()[:-1] == [*asked.tolist(), *image.tolist()]
  assert len(kinds) - len(plan.skipped) == kept


def test_targets_belong_to_their_store(tmp_path):
  with refused(UserError, samples.TARGETS, "does not exist"):
    samples.read_targets(tmp_path, 3)
  samples.write_targets(tmp_path, [(1, 2)])
  with refused(UserError, samples.TARGETS, "1 targets for 3"):
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
  with refused(UserError, "no records"):
    mixture(tasks, [1, 0, 2])
  with refused(UserError, "weight 0"):
    mixture([make_task(weight=0.0)], [3])

from collections import Counter
import dataclasses

import jax
from jax.sharding import NamedSharding
import numpy as np
import pytest

from cm3leon_jax.data.documents.store import Document, Segment
from cm3leon_jax.data.rows.loader import (
  RowLoader,
  batches,
  build_sample,
  join,
  local_rows,
  pack_row,
  rows_of_samples,
)
from cm3leon_jax.data.rows.plan import RowPlan
from cm3leon_jax.data.rows.sample_plan import SamplePlan
from cm3leon_jax.errors import UserError
from cm3leon_jax.mesh import MeshConfig, create_mesh, spec
from tests.data.stores import VOCAB, damage_record, make_plan, make_sources
from tests.refusals import refused

EOS, BRK, EOSS, MASK, PAD = VOCAB.eos, VOCAB.brk, VOCAB.eoss, VOCAB.mask(0), VOCAB.pad


def pair(caption, codes):
  text = Segment(False, np.array(caption, np.int32))
  return Document("k", (text, Segment(True, VOCAB.image_ids(codes))), "s", "l", "a")


DOCUMENT, NEIGHBOR = pair([40, 41], [5, 6]), pair([50], [7, 8])


def test_join_literal():
  expected = [EOS, 50, BRK, 519, 520, BRK, 40, 41, BRK, 517, 518, EOS]
  np.testing.assert_array_equal(join([NEIGHBOR, DOCUMENT], VOCAB), expected)


def test_conditioning_drop_literal():
  tokens, weights, own, source = build_sample(DOCUMENT, [], SamplePlan((), True, (), 6), VOCAB, 1.0)
  assert not source
  np.testing.assert_array_equal(tokens, [EOS, MASK, BRK, 517, 518, EOS])
  np.testing.assert_array_equal(weights, [0, 0, 0, 1, 1, 1])
  assert np.flatnonzero(own).tolist() == [3, 4]


def test_weights_follow_tokens_through_the_mask():
  plan = SamplePlan((0,), False, ((6, 8),), 15)
  tokens, weights, own, source = build_sample(DOCUMENT, [NEIGHBOR], plan, VOCAB, 0.1)
  assert source
  expected = [EOS, 50, BRK, 519, 520, BRK, MASK, BRK, 517, 518, EOS, MASK, 40, 41, EOSS]
  np.testing.assert_array_equal(tokens, expected)
  np.testing.assert_array_equal(weights, np.float32([0, *[0.1] * 5, *[1] * 9]))
  # 519 and 520 are codes of the neighbor, so they do not count.
  assert np.flatnonzero(own).tolist() == [8, 9]


def test_samples_of_the_template_chameleon():
  vocab = dataclasses.replace(VOCAB, template="chameleon")
  end, plan = vocab.image_end, SamplePlan((0,), False, ((6, 8),), 15)
  sample = build_sample(DOCUMENT, [NEIGHBOR], plan, vocab, 0.1)
  expected = [EOS, 50, BRK, 519, 520, end, MASK, BRK, 517, 518, end, MASK, 40, 41, EOSS]
  assert sample.tokens.tolist() == expected
  np.testing.assert_array_equal(sample.weights, np.float32([0, *[0.1] * 5, *[1] * 9]))
  assert np.flatnonzero(sample.own_codes).tolist() == [8, 9]
  dropped = build_sample(DOCUMENT, [], SamplePlan((), True, (), 5), vocab, 1.0)
  assert dropped.tokens.tolist() == [EOS, BRK, 517, 518, end]
  assert dropped.weights.tolist() == [0, 0, 1, 1, 1]
  texts = Document("k", (DOCUMENT.segments[0], NEIGHBOR.segments[0]), "s", "l", "a")
  assert join([texts], vocab).tolist() == [EOS, 40, 41, EOSS, 50, EOSS]


def test_infill_in_a_neighbor_keeps_the_neighbors_weight():
  tokens, weights, own, _ = build_sample(
    DOCUMENT, [NEIGHBOR], SamplePlan((0,), False, ((1, 2),), 15), VOCAB, 0.5
  )
  assert tokens[12:].tolist() == [MASK, 50, EOSS]
  assert weights[12:].tolist() == [1, 0.5, 1]
  assert tokens[own].tolist() == [517, 518]


def test_a_document_that_alone_does_not_fit_loses_its_tail():
  tokens, *_ = build_sample(DOCUMENT, [], SamplePlan((), False, (), 5), VOCAB, 1.0)
  np.testing.assert_array_equal(tokens, [EOS, 40, 41, BRK, 517])


def test_a_changed_store_is_refused():
  with refused(ValueError, "'k'", "store changed"):
    build_sample(DOCUMENT, [], SamplePlan((), False, (), 9), VOCAB, 1.0)


def test_pack_row_literal():
  samples = [
    (np.array([EOS, 40, EOS]), np.float32([0, 1, 1])),
    (np.array([EOS, MASK, BRK, 517]), np.float32([0, 0, 0, 1])),
  ]
  row = pack_row(samples, 7, VOCAB)
  assert row["inputs"].tolist() == [EOS, 40, EOS, MASK, BRK, PAD, PAD]
  assert row["targets"].tolist() == [40, EOS, MASK, BRK, 517, PAD, PAD]
  assert row["loss_weights"].tolist() == [1, 1, 0, 0, 1, 0, 0]
  assert row["segment_ids"].tolist() == [1, 1, 2, 2, 2, 0, 0]
  assert row["positions"].tolist() == [0, 1, 0, 1, 2, 0, 0]


def test_aligned_positions_of_a_row_are_those_of_whole_samples():
  sample, dropped = join([NEIGHBOR, DOCUMENT], VOCAB), np.array([EOS, MASK, BRK, 517])
  ones = [np.ones(len(x), np.float32) for x in (sample, dropped)]
  row = pack_row(zip((sample, dropped), ones), 16, VOCAB, align_images=True)
  # The target 517 reveals the row's start of the second sample, although its neighbor is dropped.
  expected = [-3, -2, -1, 0, 1, 2, -3, -2, -1, 0, 1, -3, -2, -1, 0, 0]
  assert row["positions"].tolist() == expected
  whole = rows_of_samples([sample], 11, VOCAB, align_images=True)
  assert whole["positions"].tolist() == [expected[:11]]


def test_rows_of_samples_pads_each_to_the_length():
  batch = rows_of_samples([np.array([EOS, 40, EOS]), np.array([EOS, 41, 42, EOS])], 4, VOCAB)
  assert batch["targets"].tolist() == [[40, EOS, PAD, PAD], [41, 42, EOS, PAD]]
  assert batch["loss_weights"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 0]]


@pytest.fixture(scope="module")
def loader(tmp_path_factory):
  return RowLoader(make_plan(make_sources(tmp_path_factory.mktemp("stores"))), VOCAB)


def take(iterator, n):
  return [jax.device_get(next(iterator)) for _ in range(n)]


def test_no_target_belongs_to_another_sample(loader):
  for i in range(50):
    row = loader[i]
    inside = (row["segment_ids"][:-1] == row["segment_ids"][1:]) & (row["segment_ids"][1:] > 0)
    np.testing.assert_array_equal(row["inputs"][1:][inside], row["targets"][:-1][inside])
    assert (row["loss_weights"][row["segment_ids"] == 0] == 0).all()
    starts = np.flatnonzero(np.diff(row["segment_ids"], prepend=0) > 0)
    assert (row["inputs"][starts] == EOS).all()
    assert (row["positions"][starts] == 0).all()


@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 2, 2), (1, 1, 8)])
def test_batches_are_the_rows_on_any_mesh(loader, shape):
  mesh = create_mesh(MeshConfig(*shape))
  sharding = NamedSharding(mesh, spec("batch", "length"))
  for j, batch in enumerate(take(batches(loader, 8, 8, sharding), 2)):
    for r in range(8):
      row = loader[8 + 8 * j + r]
      for name, x in batch.items():
        np.testing.assert_array_equal(x[r], row[name])


def test_local_rows_of_a_replicated_axis_are_read_once():
  sharding = NamedSharding(create_mesh(MeshConfig(1, 2, 4)), spec("batch", "length"))
  assert local_rows(sharding, (8, 128)) == list(range(8))


@pytest.mark.parametrize(("after", "alone"), [(0.8, 0.8), (0.8, 0.0), (0.0, 0.8)])
def test_hidden_codes_are_those_of_the_documents_own_images(tmp_path, after, alone):
  """Here codes of neighbors have the loss weight 0.25, and the document's own codes 1."""
  sources = make_sources(tmp_path)
  fields = {"neighbor_loss_weight": 0.25, "text_share": 0.3, "sequence_length": 256}
  whole = RowLoader(make_plan(sources, **fields), VOCAB)
  dropout = {"code_dropout": after, "code_dropout_alone": alone}
  hiding = RowLoader(make_plan(sources, **dropout, **fields), VOCAB)
  shares: dict[bool, list[float]] = {True: [], False: []}
  for i in range(40):
    row, partly = whole[i], hiding[i]
    for name in ("targets", "loss_weights", "segment_ids", "positions"):
      np.testing.assert_array_equal(row[name], partly[name])
    hidden = row["inputs"] != partly["inputs"]
    assert (partly["inputs"][hidden] == VOCAB.unk).all()
    # The weight of an input token is at the position before it, where the token is predicted.
    own = VOCAB.is_image(row["inputs"]) & (np.roll(row["loss_weights"], 1) == 1)
    assert not (hidden & ~own).any()
    for segment in set(row["segment_ids"][own].tolist()):
      mine = row["segment_ids"] == segment
      has_neighbors = bool((row["loss_weights"][mine] == 0.25).any())
      shares[has_neighbors].append(hidden[own & mine].mean())
    np.testing.assert_array_equal(hiding[i]["inputs"], partly["inputs"])  # A row is reproducible.
  for has_neighbors, most in ((True, after), (False, alone)):
    assert len(shares[has_neighbors]) > 9
    assert np.mean(shares[has_neighbors]) == pytest.approx(most / 2, abs=0.1)
    # Each sample draws its own share, so shares vary.
    assert (np.std(shares[has_neighbors]) > 0.15) == (most > 0)


NUM_ROWS = 150


def rows_with(loader, document):
  """Returns row -> slices of the row's samples that contain the pair `document`."""
  found = {}
  for i in range(NUM_ROWS):
    at = 0
    for placement in loader.plan.row(i):
      source, pass_, unit, length = placement
      spec = loader.plan.sources[source]
      plan = loader.plan.plan(source, pass_, unit)
      read = [unit] if source == 0 else []
      if source == 0 and not plan.dropped:
        read += [int(spec.candidates(unit)[j]) for j in plan.neighbors]
      if document in read:
        found.setdefault(i, []).append(slice(at, at + length))
      at += length
  return found


def test_a_bad_record_stops_the_rows_and_is_named(tmp_path):
  sources = make_sources(tmp_path)
  loader = RowLoader(make_plan(sources), VOCAB)
  places = rows_with(loader, 7)
  damage_record(tmp_path / "pairs" / "000000.array_record", 7)
  for i in range(NUM_ROWS):
    if i in places:
      with refused(UserError, "record 7"):
        loader[i]
    else:
      loader[i]
  sharding = NamedSharding(create_mesh(MeshConfig()), spec("batch", "length"))
  with refused(UserError, "record 7"):
    take(batches(loader, 0, 8, sharding), NUM_ROWS // 8)


def test_a_skipped_record_leaves_all_other_samples_as_they_are(tmp_path, capsys):
  fields = {"code_dropout": 0.5, "code_dropout_alone": 0.5}
  make = make_sources(tmp_path)
  whole = RowLoader(make_plan(make, **fields), VOCAB)
  rows = [whole[i] for i in range(NUM_ROWS)]
  places = rows_with(whole, 7)
  assert len(places) > 3
  damage_record(tmp_path / "pairs" / "000000.array_record", 7)
  loader = RowLoader(make_plan(make, on_bad_record="skip", **fields), VOCAB)
  for i, expected in enumerate(rows):
    row = loader[i]
    for place in places.get(i, []):
      assert (row["inputs"][place] == PAD).all()
      assert not row["loss_weights"][place].any()
      for name in ("inputs", "targets", "loss_weights", "positions"):
        expected[name][place] = row[name][place]
    for name in row:
      np.testing.assert_array_equal(row[name], expected[name])
  warned = capsys.readouterr().out.splitlines()
  assert len(warned) == sum(map(len, places.values()))
  assert warned[0].startswith("warning: skipped sample 1 of at most 100: ")
  assert "record 7 (document 7 of the store)" in warned[0]
  loader[min(places)]
  assert capsys.readouterr().out == ""  # Reading the row again does not count its sample again.


class HostSharding:
  """Fakes the sharding as seen by one of several hosts with equally many devices."""

  def __init__(self, sharding, host, hosts):
    self._sharding, self._host, self._hosts = sharding, host, hosts

  def addressable_devices_indices_map(self, shape):
    indices = self._sharding.devices_indices_map(shape)
    mine = sorted(indices, key=lambda device: device.id)[self._host :: self._hosts]
    return {device: indices[device] for device in mine}


@pytest.mark.parametrize("phases", [(1,), (1, 4, 2)])
def test_a_pass_visits_every_unit_once_whatever_hosts_read_it(tmp_path, phases):
  """Changes the number of hosts between phases. Each host plans from starts that host 0 wrote."""
  sources, batches_in_all = make_sources(tmp_path), 36
  sharding = NamedSharding(create_mesh(MeshConfig(8, 1, 1)), spec("batch", "length"))
  read, placed = [], Counter()
  for j in range(batches_in_all):
    if j * len(phases) % batches_in_all < len(phases):
      hosts = phases[j * len(phases) // batches_in_all]
      config = make_plan(sources).config
      path = tmp_path / "plan.jsonl"
      plans = [
        RowPlan(sources, config, VOCAB, 0, path, write_starts=host == 0) for host in range(hosts)
      ]
    for host, plan in enumerate(plans):
      for r in local_rows(HostSharding(sharding, host, hosts), (8, config.sequence_length)):
        read.append(8 * j + r)
        placed.update(placement[:3] for placement in plan.row(8 * j + r))
  assert sorted(read) == list(range(8 * batches_in_all))
  assert set(placed.values()) == {1}
  for source, units in enumerate(plans[0].units):
    assert {unit for s, pass_, unit in placed if (s, pass_) == (source, 0)} == set(
      range(len(units))
    )

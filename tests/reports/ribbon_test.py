import numpy as np

from cm3leon_jax.data.documents.store import Document, Segment
from cm3leon_jax.data.rows import loader
from cm3leon_jax.data.rows.sample_plan import SamplePlan
from cm3leon_jax.reports import row_contents, row_parts
from cm3leon_jax.reports.ribbon import ribbon, runs
from tests.data.stores import VOCAB


def pair(key, words, codes):
  segments = (
    Segment(False, VOCAB.num_special + np.arange(words, dtype=np.int32)),
    Segment(True, VOCAB.image_ids(range(codes))),
  )
  return Document(key, segments, "test", "CC0-1.0", "nobody")


def make_view():
  """Makes a row of a sample with a neighbor, a sample with dropped conditions, and padding.

  first sample: </s> w w <break> i <mask:0> i <break> w <break> i i i i </s> <mask:0> i i <eoss>
  """
  neighbor, document = pair("n", 2, 4), pair("d", 1, 4)
  length = 1 + 3 + 4 + 1 + 2 + 4 + 1 + 3
  samples = [
    loader.build_sample(
      document, [neighbor], SamplePlan((0,), False, ((5, 7),), length), VOCAB, 0.5
    ),
    loader.build_sample(document, [], SamplePlan((), True, (), 8), VOCAB, 0.5),
  ]
  row = loader.pack_row([sample[:2] for sample in samples], 28, VOCAB)
  first, second = row_parts.split_row(row, VOCAB)
  origin = row_contents.Origin(document, (row_contents.NeighborView(neighbor, 2, 4, 0.5),), 0)
  views = [
    row_contents.view_sample(first, origin, VOCAB, 28),
    row_contents.view_sample(second, row_contents.Origin(document, (), 0), VOCAB, 28),
  ]
  return row_contents.RowView(0, views, row["loss_weights"])


def test_runs():
  assert runs([0, 1, 1, 0]) == [(0, 1, 0), (1, 2, 1), (3, 1, 0)]
  assert runs([]) == []


def test_parts_cover_every_position():
  found = ribbon(make_view())
  assert (found["length"], found["used"]) == (28, 25)
  assert found["samples"] == [(0, 18, 1, "d"), (18, 7, 2, "d")]
  # Parts have no gaps. The last token of a sample has no position: it is only predicted.
  ends = np.cumsum([p["width"] for p in found["parts"]])
  assert [p["x"] for p in found["parts"]] == [0, *ends[:-1]]
  kinds = [(p["kind"], p["width"], p["span"]) for p in found["parts"]]
  special, mask = ("special", 1, -1), ("special", 1, 0)
  neighbor = [("text", 2, -1), special, ("image", 1, -1), mask, ("image", 1, -1), special]
  document = [("text", 1, -1), special, ("image", 4, -1), special]
  infill, dropped = [mask, ("image", 2, 0), special], [mask, special, ("image", 4, -1)]
  assert kinds == [special, *neighbor, *document, *infill, *dropped]
  assert found["parts"][12]["title"] == "neighbor 1: image, positions 16 to 17, infill"
  assert [(o["x"], o["width"], o["role"]) for o in found["owners"]] == [
    (1, 6, "neighbor"), (8, 6, "document"), (19, 6, "document"),
  ]  # fmt: skip
  assert found["moves"] == [(5.5, 17.0, 0)]


def test_weights_are_those_of_the_row():
  view = make_view()
  found = ribbon(view)
  rebuilt = np.zeros(28)
  for x, width, weight in found["weights"]:
    rebuilt[x : x + width] = weight
  np.testing.assert_array_equal(rebuilt, view.loss_weights)
  # The neighbor's tokens have weight 0.5, its sentinel 1, and the sentinel and <break> of the
  # dropped sample 0.
  neighbor = [(0, 4, 0.5), (4, 1, 1.0), (5, 2, 0.5)]
  assert found["weights"] == [*neighbor, (7, 8, 1.0), (15, 2, 0.5), (17, 1, 1.0), (20, 5, 1.0)]

import numpy as np
import pytest

from benchmarks import scene_retrieval, scene_retrieval_table
from benchmarks.scene_retrieval import Corpus, Experiment, chosen, copied
from cm3leon_jax.data.documents.store import Document, Segment
from cm3leon_jax.vocab import VocabLayout

VOCAB = VocabLayout(num_special=8, text_size=272, image_size=16)


class Settings:
  vocab = VOCAB


def corpus(bank=(), neighbors=(), subsets=()):
  nothing = np.zeros(0)
  return Corpus(list(bank), None, nothing, np.array(subsets), nothing, np.array(neighbors), nothing)


def image(*codes):
  segment = Segment(True, VOCAB.image_ids(np.array(codes, np.int32)))
  return Document("d", (segment,), "", "", "")


def test_copied_ink_in_literals():
  """Codes of the background (5) do not count. The image has 2 and 4 of the neighbor's 1 2 3 4."""
  bank = [image(5, 5, 5, 5, 5, 1, 2, 3, 4)]
  made = [np.array([5, 5, 5, 5, 5, 9, 2, 5, 4]), np.array([5, 5, 5, 5, 5, 1, 2, 3, 4])]
  shares = copied(Settings, corpus(bank, [0, 0, -1]), [0, 1, 2], [*made, made[0]])
  assert shares == [0.5, 1.0, None]
  assert copied(Settings, corpus(bank, [0]), [0], [np.full(9, 5)]) == [0.0]


def test_evenly_spaced_scenes_of_each_subset_are_judged():
  of = corpus(subsets=["common"] * 10 + ["rare"] * 3)
  assert chosen(of, 4).tolist() == [10, 11, 12, 0, 3, 6, 9]


def test_runs_differ_in_neighbors_and_documents(tmp_path, monkeypatch):
  counts = {1: 700, 0: 120}  # Number of neighbors -> number of rows that the same documents fill.
  monkeypatch.setattr(
    scene_retrieval,
    "rows_of_documents",
    lambda settings, workdir, documents=0: counts[settings.data.num_neighbors],
  )
  experiment = Experiment(tmp_path, 100, 70, 10)
  of = {name: scene_retrieval.overrides_of(experiment, name, 4) for name in ("neighbors", "tokens")}
  assert (of["neighbors"]["train.steps"], of["tokens"]["train.steps"]) == (100, 100)
  assert of["tokens"] == {**of["neighbors"], "data.num_neighbors": 0}
  documents = scene_retrieval.overrides_of(experiment, "documents", 4)
  # The 120 rows take 60 steps, because a step reads two rows.
  assert documents == {**of["tokens"], "train.steps": 60}
  assert experiment.settings(documents).seed == 4


def run(condition, seed, bits, right):
  copied = {kind: [*map(float, v[:2]), None, float(v[3])] for kind, v in right.items()}
  about = {"steps": 10, "documents": 99, "train_seconds": 1.0, "copied": copied}
  return {**about, "condition": condition, "seed": seed, "bits": bits, "right": right}


@pytest.fixture
def result():
  about = {
    "subsets": ["rare"] * 4 + ["common"] * 2,
    "concepts": ["a", "a", "b", "c", "x", "y"],
    "judged": [0, 2, 3, 4],
    "found": [True, True, True, False, True, False],
    "image_codes": 4,
    "copier": {
      "neighbor_shows_the_objects": [True, False, True],
      "right": [False, False, True],
      "original_copied": [0.0, 0.2, 1.0],
    },
  }
  runs = [
    run(
      "neighbors",
      seed,
      {
        "true": [10, 20, 30, 40, 5, 5 + seed],
        "shuffled": [50, 60, 70, 80, 6, 6],
        "none": [40, 50, 60, 70, 5, 5],
      },
      {"true": [True, True, False, True], "none": [False, False, False, True]},
    )
    for seed in (0, 1)
  ]
  runs.append(run("tokens", 0, {"none": [35, 45, 55, 65, 5, 5]}, {"none": [False] * 4}))
  return scene_retrieval_table.summarize(about, runs, scene_retrieval.CONDITIONS)


def test_summary_in_literals(result):
  rare, common = result["subsets"]["rare"], result["subsets"]["common"]
  assert (rare["documents"], rare["judged"], rare["concepts"]) == (4, 3, 3)
  assert rare["levels"]["bits"]["neighbors/true"]["mean"] == 25
  assert rare["levels"]["right"]["neighbors/true"]["mean"] == pytest.approx(2 / 3)
  assert rare["copier"] == {
    "neighbor_shows_the_objects": 0.5,
    "right": 0,
    "original_copied": pytest.approx(0.1),
  }
  assert rare["levels"]["copied"]["neighbors/true"]["mean"] == 1
  assert (rare["found"], common["found"]) == (0.75, 0.5)
  by_name = {(d["measure"], d["first"], d["second"]): d for d in rare["differences"]}
  none = by_name["bits", "neighbors/true", "neighbors/none"]
  assert (none["mean"], none["relative"]) == (-30, pytest.approx(-30 / 55))
  assert (none["low"], none["high"], none["seeds"]) == (-30, -30, (-30, -30))
  tokens = by_name["bits", "neighbors/true", "tokens/none"]
  assert (tokens["mean"], tokens["by_seed"], tokens["seeds"]) == (-25, [-25], None)
  assert common["levels"]["bits"]["neighbors/true"]["by_seed"] == [5, 5.5]


def test_the_table_says_it(result):
  text = scene_retrieval_table.markdown(result)
  assert "**rare**: 4 held-out scenes of 3 concepts, 3 of them judged. 75.0% have a " in text
  assert "| trained with a neighbor | true neighbor | 6.250 [" in text
  assert "-7.500" in text  # A difference of 30 bits over 4 codes.
  assert "-55% |" in text

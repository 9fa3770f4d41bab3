import dataclasses
import pathlib

from matplotlib.image import imread
import numpy as np
import pytest

from benchmarks import experiment, scaling, scaling_table, scene_retrieval
from benchmarks.scaling import Scaling, Size
from benchmarks.scaling_fit import Law
from cm3leon_jax.config import UserError
from cm3leon_jax.files.json_files import read_json, write_json
from cm3leon_jax.runs import stages
from cm3leon_jax.training.watch import flops
from tests.refusals import refused

# Laws of bits per image. For rare images, retrieval divides the FLOPs by 5; for others, it
# multiplies them by 3.
LAWS = {
  ("rare", "without"): Law(1e12, np.float64(0), np.float64(90), np.float64(0.2)),
  ("rare", "neighbors"): Law(2e11, np.float64(0), np.float64(90), np.float64(0.2)),
  ("common", "without"): Law(1e12, np.float64(0), np.float64(20), np.float64(0.3)),
  ("common", "neighbors"): Law(3e12, np.float64(0), np.float64(20), np.float64(0.3)),
}
PLOT = scaling_table.plot
SUBSETS = ["rare"] * 6 + ["common"] * 9


def small(tmp_path, **changes):
  given = {"scenes.heldout": 70}
  sizes = scaling.parse_sizes(["56", "68", "84", "104"])
  values = Scaling(
    tmp_path, sizes, Size(128, 4, 2), ("neighbors", "without"), (0, 1), 3.0, 1.0, -1.0, 4, given
  )
  return dataclasses.replace(values, **changes)


@pytest.fixture
def trained(tmp_path, monkeypatch):
  """Fakes training by scaling laws and skips slow plots; returns the list of runs in order.

  Each run is (parent folder, folder, whether predictions.json existed before the run).
  """
  order = []

  def run_stage(name, config, workdir, fields):
    if name == "train":
      folder = pathlib.Path(workdir)
      with stages.once(folder / "train", {"seed": fields["seed"]}) as summary:
        if summary is not None:
          order.append((folder.parent.name, folder.name, (tmp_path / "predictions.json").exists()))

  def measure(settings, run, corpus, condition, judged):
    spent = settings.train.steps * settings.train.global_batch_size * settings.data.sequence_length
    spent = flops.model_flops(settings.model, spent, settings.data.sequence_length)
    # Each image and each seed multiplies the bits by a factor. The factors have mean 1.
    factors = np.linspace(0.5, 1.5, 6).tolist() + np.linspace(0.8, 1.2, 9).tolist()
    seed = 1 + 0.01 * (2 * settings.seed - 1)
    bits = [
      float(LAWS[s, condition].bits(spent)) * f * seed for s, f in zip(corpus.subsets, factors)
    ]
    return {
      "bits": bits,
      "right": [condition == "neighbors"] * len(scene_retrieval.chosen(corpus, judged)),
    }

  def open_corpus(workdir, settings, subsets_of):
    rows = np.arange(len(SUBSETS))
    concepts = np.array([f"{s} {i // 2}" for i, s in enumerate(SUBSETS)])
    return scene_retrieval.Corpus(None, None, rows, np.array(SUBSETS), concepts, rows, rows)

  monkeypatch.setattr(experiment, "run_stage", run_stage)
  monkeypatch.setattr(scaling_table, "plot", lambda result, path: path.touch())
  monkeypatch.setattr(scaling, "measure", measure)
  monkeypatch.setattr(scene_retrieval, "open_corpus", open_corpus)
  return order


def test_sizes_are_parsed():
  assert scaling.parse_sizes(["64", "96x6x3"]) == (Size(64, 4, 2), Size(96, 6, 3))
  assert str(Size(96, 6, 3)) == "96x6x3"
  for wrong in ("", "x", "64x2", "0", "64x-1x2", "6.4"):
    with refused(UserError):
      scaling.parse_sizes([wrong])


def test_fields_are_parsed():
  fields = scaling.parse_fields(
    ["train.log_every=5", "optimizer.schedule=linear", "vqgan.multipliers=(1,)"]
  )
  assert fields == {"train.log_every": 5, "optimizer.schedule": "linear", "vqgan.multipliers": (1,)}
  with refused(UserError):
    scaling.parse_fields(["train.log_every"])


def test_a_size_of_the_width_of_the_config_is_its_decoder(tmp_path):
  of = small(tmp_path)
  base = of.settings(of.shared_fields())
  size = Size(base.model.width, base.model.num_layers, base.model.num_heads)
  settings = of.settings(of.fields(size, "neighbors", 0))
  assert (settings.model, settings.optimizer) == (base.model, base.optimizer)
  assert (settings.data, settings.data.num_neighbors) == (base.data, 1)


def test_width_sets_start_rate_and_length(tmp_path):
  of = small(tmp_path)
  wide, narrow = (of.settings(of.fields(Size(w, 4, 2), "without", 3)) for w in (128, 64))
  assert narrow.optimizer.learning_rate == pytest.approx(2 * wide.optimizer.learning_rate)
  assert narrow.model.init_std == pytest.approx(2**0.5 * wide.model.init_std, rel=1e-5)
  assert narrow.model.embed_std == wide.model.embed_std
  assert 2 * narrow.model.mlp_width == wide.model.mlp_width
  assert (narrow.data.num_neighbors, narrow.seed) == (0, 3)
  for settings in (wide, narrow):
    tokens, parameters = settings.train.steps * 1_024, flops.matmul_params(settings.model)
    assert 3 * parameters <= tokens < 3 * parameters + 1_024
  constant = small(tmp_path, learning_rate_power=0.0)
  assert constant.fields(Size(64, 4, 2), "without", 0)["optimizer.learning_rate"] == pytest.approx(
    wide.optimizer.learning_rate
  )


def test_tokens_may_grow_more_slowly_than_parameters(tmp_path):
  sizes = (Size(128, 4, 2), Size(64, 4, 2))
  equal, root, proportional = (
    [small(tmp_path, tokens_power=p).fields(size, "without", 0)["train.steps"] for size in sizes]
    for p in (0.0, 0.5, 1.0)
  )
  assert equal == [3_120, 3_120]
  assert proportional == [3_120, 972]  # The two sizes have 1,064,960 and 331,776 parameters.
  assert root == [3_120, 1_742]


def test_conditions_differ_in_neighbors_alone_and_cost_as_much(tmp_path):
  of = small(tmp_path)
  fields = [of.fields(Size(64, 4, 2), condition, 0) for condition in of.conditions]
  assert fields[1] == {**fields[0], "data.num_neighbors": 0}
  about = scaling.describe(of, Size(64, 4, 2))
  settings = of.settings(fields[0])
  assert about["tokens"] == 1_024 * settings.train.steps
  assert about["flops"] == flops.model_flops(settings.model, about["tokens"], 512)


@pytest.mark.slow
def test_the_fifth_size_is_predicted_before_it_is_trained(tmp_path, trained):
  result = scaling.run_all(small(tmp_path))
  assert len(trained) == 20
  before = [(folder.split("x")[0], exists) for folder, _, exists in trained]
  assert before == [
    *(2 * [(w, False) for w in ("56", "68", "84", "104") for _ in range(2)]),
    *(4 * [("128", True)]),
  ]
  for name in ("rare", "common"):
    of = result["images"][name]
    for condition, row in of["predictions"].items():
      assert row["measured"] == pytest.approx(of["series"][condition]["bits"][-1]["mean"])
      assert abs(row["error"]) < 1e-9
      assert row["low"] < row["bits"] < row["high"]
  at_best = {name: of["ratios"] for name, of in result["images"].items()}
  assert at_best["rare"][0]["ratio"] == pytest.approx(5)
  assert at_best["common"][1]["ratio"] == pytest.approx(1 / 3)
  assert all(row["low"] <= row["ratio"] <= row["high"] for row in at_best["rare"])
  # To reach the best loss of the better condition, the other condition would need more FLOPs than
  # its largest run.
  assert [row["beyond"] for row in at_best["rare"]] == [None, "above"]
  assert [row["beyond"] for row in at_best["common"]] == ["above", None]
  assert read_json(tmp_path / "results.json")["images"]["rare"]["documents"] == 6
  PLOT(result, tmp_path / "plot.png")
  assert imread(tmp_path / "plot.png").std() > 0.05
  text = (tmp_path / "table.md").read_text()
  assert "**common**: 9 held-out images of 5 concepts, 4 of them judged." in text
  assert "5.00x" in text
  assert "less than 1.00x (extrapolated: 0.33x)" in text
  assert "+0.0%" in text or "-0.0%" in text


@pytest.mark.slow
def test_a_later_start_keeps_runs_and_prediction(tmp_path, trained):
  first = scaling.run_all(small(tmp_path))
  written = (tmp_path / "predictions.json").read_text()
  trained.clear()
  assert scaling.run_all(small(tmp_path)) == first
  assert trained == []
  assert (tmp_path / "predictions.json").read_text() == written


@pytest.mark.slow
def test_a_prediction_is_not_made_anew(tmp_path, trained):
  scaling.run_all(small(tmp_path))
  path = tmp_path / "predictions.json"
  written = path.read_text()
  with pytest.raises(UserError, match="was made with another config"):
    scaling.run_all(small(tmp_path, seeds=(0,)))
  assert path.read_text() == written
  path.unlink()
  with refused(UserError):
    scaling.run_all(small(tmp_path))
  assert not path.exists()


def test_the_first_prediction_stays(tmp_path):
  path = tmp_path / "predictions.json"
  first = scaling.predict_once(path, {"runs": 1}, {"series": 1}, started=False)
  again = scaling.predict_once(path, {"runs": 1}, {"series": 2}, started=True)
  assert again == first
  assert first["series"] == 1
  # Control: the function returns the predictions that are in the file.
  write_json(path, {**first, "series": 3})
  assert scaling.predict_once(path, {"runs": 1}, {"series": 1}, started=True)["series"] == 3


@pytest.mark.slow
def test_late_copying_is_mispredicted(tmp_path, trained, monkeypatch):
  """Control: a loss that drops suddenly between the fourth and fifth size is mispredicted."""

  class Late(Law):
    def bits(self, flops):
      return np.where(np.asarray(flops) > 2e13, 30.0, 90.0)

  monkeypatch.setitem(LAWS, ("rare", "neighbors"), Late(1e12, *np.ones(3)))
  rows = scaling.run_all(small(tmp_path))["images"]["rare"]["predictions"]
  assert rows["neighbors"]["error"] > 1.5
  assert abs(rows["without"]["error"]) < 1e-9


@pytest.mark.parametrize(
  ("best_of", "beyond", "bound", "ratio", "text"),
  [
    ("without", None, None, 2.1, "2.10x"),
    ("without", "below", 4, 9.3, "more than 4.00x (extrapolated: 9.30x)"),
    ("without", "above", 1, 0.3, "less than 1.00x (extrapolated: 0.30x)"),
    ("neighbors", "above", 1, np.inf, "more than 1.00x (extrapolated: never)"),
    ("neighbors", "below", 0.25, 0.1, "less than 0.25x (extrapolated: 0.10x)"),
  ],
)
def test_ratios_say_what_is_extrapolated(best_of, beyond, bound, ratio, text):
  row = {"best_of": best_of, "beyond": beyond, "bound": bound, "ratio": ratio}
  assert scaling_table.describe_ratio(row) == text


def test_the_plan_is_a_table(tmp_path):
  of = small(tmp_path)
  text = scaling_table.plan([scaling.describe(of, size) for size in (*of.sizes, of.predicted)])
  assert "| 56x4x2 | 267,008 |" in text
  assert text.count("\n") == 7

import numpy as np
from PIL import Image
import pytest

from benchmarks import ablation_table
from benchmarks.ablation_table import Run

LABELS = {"0": "K = 0", "2": "K = 2", "shuffled": "K = 2, shuffled"}
RESULT = {
  "heldout": {
    "drawn_by_others": {"documents": 196, "concepts": 173},
    "new": {"documents": 219, "concepts": 71},
  },
  "conditions": [
    {
      "condition": "0",
      "label": "K = 0",
      "seeds": [0, 1],
      "bits_per_image_code": {
        "drawn_by_others": {"mean": 4.01239, "standard_deviation": 0.0213, "values": [3.99, 4.03]},
        "new": {"mean": 4.2, "standard_deviation": 0.03, "values": [4.17, 4.23]},
      },
      "bits_per_caption_token": {
        "drawn_by_others": {"mean": 6.5, "standard_deviation": 0.1, "values": [6.4, 6.6]},
        "new": {"mean": 7.5, "standard_deviation": 0.1, "values": [7.4, 7.6]},
      },
      "query_documents": 4800,
      "train_seconds": 240,
    },
    {
      "condition": "2",
      "label": "K = 2",
      "seeds": [0],
      "bits_per_image_code": {
        "drawn_by_others": {"mean": 3.9, "standard_deviation": None, "values": [3.9]},
        "new": {"mean": 4.3, "standard_deviation": None, "values": [4.3]},
      },
      "bits_per_caption_token": {
        "drawn_by_others": {"mean": 0.5, "standard_deviation": None, "values": [0.5]},
        "new": {"mean": 7.0, "standard_deviation": None, "values": [7.0]},
      },
      "query_documents": 1600,
      "train_seconds": 250,
    },
  ],
  "differences": [
    {
      "label": "(K = 2) - (K = 0)",
      "subset": "new",
      "bits": 0.1,
      "concepts": (0.05, 0.15),
      "by_seed": [0.08, 0.12],
      "seeds": (0.01, 0.19),
    }
  ],
}
TABLE = """\
drawn by others: the bank has the concept in another style; 196 drawings, 173 concepts.
new: the bank has nothing of the concept; 219 drawings, 71 concepts.

| neighbors | seeds | bits per image code, drawn by others | bits per image code, new | \
bits per caption token, drawn by others | bits per caption token, new | query documents \
| training (s) |
| --- | --- | --- | --- | --- | --- | --- | --- |
| K = 0 | 2 | 4.012 ± 0.021 | 4.200 ± 0.030 | 6.500 ± 0.100 | 7.500 ± 0.100 | 4,800 | 240 |
| K = 2 | 1 | 3.900 | 4.300 | 0.500 | 7.000 | 1,600 | 250 |

| bits per image code | held out | difference | 95% over concepts | 95% over seeds | by seed \
| shows |
| --- | --- | --- | --- | --- | --- | --- |
| (K = 2) - (K = 0) | new | +0.100 | [+0.050, +0.150] | [+0.010, +0.190] | +0.080, +0.120 \
| more bits |
"""


def run(condition, seed, image_bits, codes=4):
  n = len(image_bits)
  return Run(
    condition,
    seed,
    np.array(image_bits),
    np.full(n, codes),
    np.full(n, 6.0),
    np.full(n, 3),
    10,
    2.0,
  )


def test_the_table_of_literal_numbers():
  assert ablation_table.markdown(RESULT) == TABLE


@pytest.mark.parametrize(
  ("concepts", "seeds", "shown"),
  [
    ((-0.2, -0.1), (-0.3, -0.05), "fewer bits"),
    ((0.1, 0.2), (0.05, 0.3), "more bits"),
    ((-0.2, 0.1), (-0.3, -0.05), "no clear difference"),  # The images differ too much,
    ((-0.2, -0.1), (-0.4, 0.1), "no clear difference"),  # or the seeds do.
    ((-0.2, -0.1), None, "one seed shows nothing"),
    (None, (-0.2, -0.1), "one concept shows nothing"),
  ],
)
def test_a_difference_shows_something_if_both_intervals_exclude_zero(concepts, seeds, shown):
  assert ablation_table.verdict({"concepts": concepts, "seeds": seeds}) == shown


def test_student_interval_is_that_of_the_docstring():
  assert ablation_table.student_interval([1, 2, 3]) == pytest.approx((-0.484, 4.484), abs=1e-3)
  assert ablation_table.student_interval([1]) is None


def test_summary_of_literal_runs():
  runs = [
    run("0", 0, [8, 12, 16, 16]),
    run("0", 1, [10, 14, 18, 18]),
    run("2", 0, [7, 11, 20, 20]),
    run("2", 1, [9, 13, 22, 22]),
  ]
  subsets = {
    "drawn_by_others": np.array([True, True, False, False]),
    "new": np.array([False, False, True, True]),
  }
  result = ablation_table.summarize(runs, LABELS, subsets, np.array([5, 6, 7, 8]))
  none, two = result["conditions"]  # Nothing of the condition that was not run.
  assert none["bits_per_image_code"]["drawn_by_others"]["values"] == [2.5, 3.0]
  assert two["bits_per_image_code"]["new"] == {
    "mean": 5.25,
    "standard_deviation": pytest.approx(0.354, abs=1e-3),
    "values": [5, 5.5],
  }
  assert none["bits_per_caption_token"]["new"]["mean"] == 2
  assert result["heldout"]["drawn_by_others"] == {"documents": 2, "concepts": 2}
  fewer, more = result["differences"]
  assert (fewer["label"], fewer["subset"], fewer["bits"], fewer["by_seed"]) == (
    "(K = 2) - (K = 0)",
    "drawn_by_others",
    -0.25,
    [-0.25, -0.25],
  )
  assert (more["bits"], ablation_table.verdict(fewer), ablation_table.verdict(more)) == (
    1.0,
    "fewer bits",
    "more bits",
  )


def test_differences_are_of_equal_seeds_and_whole_concepts():
  rng = np.random.default_rng(0)
  base, concepts = rng.uniform(5, 15, 40), np.repeat(np.arange(20), 2)
  gain = np.repeat(rng.normal(0.5, 1, 20), 2)  # The drawings of a concept gain alike.
  runs, others = [run("2", 1, base - gain)], [run("0", 0, base + 100), run("0", 1, base)]
  everything = np.ones(40, bool)

  def width(delta) -> float:
    return delta["concepts"][1] - delta["concepts"][0]

  delta = ablation_table.difference(runs, others, everything, concepts)
  assert delta["bits"] == pytest.approx(-gain.mean() / 4)
  assert len(delta["by_seed"]) == 1
  alone = ablation_table.difference(runs, others, everything, np.arange(40))
  assert width(delta) > 1.2 * width(alone)
  assert (delta["groups"], alone["groups"]) == (20, 40)
  one = ablation_table.difference(runs, others, everything, np.zeros(40, int))
  assert (one["concepts"], one["groups"]) == (None, 1)


def test_the_plot_is_an_image(tmp_path):
  ablation_table.plot(RESULT, tmp_path / "plot.png")
  with Image.open(tmp_path / "plot.png") as image:
    assert image.width > image.height > 300

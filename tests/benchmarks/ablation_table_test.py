import numpy as np
from PIL import Image
import pytest

from benchmarks import ablation_table
from benchmarks.ablation_table import Run

LABELS = {"0": "K = 0", "2": "K = 2", "shuffled": "K = 2, shuffled"}


def run(condition, seed, image_bits, codes=4):
  image_bits = np.array(image_bits)
  arrays = (np.full_like(image_bits, x) for x in (codes, 6, 3))
  return Run(condition, seed, image_bits, *arrays, 10, 2.0)


@pytest.fixture
def result():
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
  return ablation_table.summarize(runs, LABELS, subsets, np.array([5, 6, 7, 8]))


def test_the_table_has_a_row_of_the_numbers_of_each_condition_and_difference(result):
  lines = ablation_table.markdown(result).splitlines()
  for of in result["conditions"]:
    [row] = [line for line in lines if line.startswith(f"| {of['label']} | {len(of['seeds'])} |")]
    for measure in ("bits_per_image_code", "bits_per_caption_token"):
      for numbers in of[measure].values():
        assert f"{numbers['mean']:.3f} ± {numbers['standard_deviation']:.3f} |" in row
  rows = [line for line in lines if line.startswith("| (K = 2) - (K = 0) |")]
  for row, of in zip(rows, result["differences"], strict=True):
    assert row.endswith(f" | {ablation_table.verdict(of)} |")
    assert ", ".join(f"{x:+.3f}" for x in of["by_seed"]) in row


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


def test_summary_of_literal_runs(result):
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
  assert (fewer["label"], fewer["subset"]) == ("(K = 2) - (K = 0)", "drawn_by_others")
  assert (fewer["bits"], fewer["by_seed"]) == (-0.25, [-0.25, -0.25])
  verdicts = [ablation_table.verdict(x) for x in (fewer, more)]
  assert (more["bits"], verdicts) == (1.0, ["fewer bits", "more bits"])


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


def test_the_plot_is_an_image(result, tmp_path):
  ablation_table.plot(result, tmp_path / "plot.png")
  with Image.open(tmp_path / "plot.png") as image:
    assert image.width > image.height > 300

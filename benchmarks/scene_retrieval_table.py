"""Computes means and confidence intervals from the runs of `scene_retrieval`, and formats them."""

# n held-out documents, m of which are judged.

import numpy as np

from benchmarks.experiment import student_interval
from cm3leon_jax.evaluation.intervals import mean_interval

COMPARISONS = (
  ("neighbors/true", "neighbors/none"),
  ("neighbors/true", "neighbors/shuffled"),
  ("neighbors/true", "tokens/none"),
  ("neighbors/true", "documents/none"),
)
MEASURES = {"bits": "bits an image code", "right": "wholly correct", "copied": "ink copied"}
NAMES = {"true": "true neighbor", "shuffled": "another's neighbor", "none": "no neighbor"}


def _values(runs: list[dict], measure: str, mask: np.ndarray) -> dict[str, dict[int, np.ndarray]]:
  """Returns "condition/kind of neighbor" -> seed -> values of a measure for documents in `mask`."""
  found: dict[str, dict[int, np.ndarray]] = {}
  for run in runs:
    for kind, values in run[measure].items():
      of = found.setdefault(f"{run['condition']}/{kind}", {})
      of[run["seed"]] = np.asarray(values, np.float64)[mask]
  return found


def _level(by_seed: dict[int, np.ndarray], concepts) -> dict:
  """Computes the mean over all seeds, with a confidence interval, and the mean of each seed."""
  mean = np.mean(list(by_seed.values()), axis=0)
  interval = mean_interval(mean, np.ones(len(mean)), list(concepts))
  return {
    "mean": interval["mean"],
    "low": interval["low"],
    "high": interval["high"],
    "by_seed": [float(values.mean()) for values in by_seed.values()],
  }


def _difference(first: dict, second: dict, concepts) -> dict:
  """Computes the mean of `first` minus `second` over their common seeds, with intervals.

  In the result, `relative` is the difference divided by the mean of `second`, or None if that mean
  is 0. `seeds` is the Student's t interval over the seeds.
  """
  common = sorted(first.keys() & second.keys())
  result = _level({seed: first[seed] - second[seed] for seed in common}, concepts)
  base = float(np.mean([second[seed].mean() for seed in common]))
  relative = result["mean"] / base if base else None
  return {**result, "relative": relative, "seeds": student_interval(result["by_seed"])}


def summarize(about: dict, runs: list[dict], labels: dict[str, str]) -> dict:
  """Computes all numbers of the table.

  Args:
    about: `subsets`, `concepts` and `found` (whether it has a neighbor), [n] values for each
      document; `judged`, [m] indices of the judged documents; `image_codes`; `copier`, lists with a
      value for each judged document that has a neighbor.
    runs: results of `scene_retrieval.run_one`.
    labels: condition -> name in the table.
  """
  subsets, concepts = np.array(about["subsets"]), np.array(about["concepts"])
  judged, found = np.array(about["judged"]), np.array(about["found"])
  copier_subsets = subsets[judged][found[judged]]
  result: dict = {
    "image_codes": about["image_codes"],
    "labels": labels,
    "runs": [
      {k: run[k] for k in ("condition", "seed", "steps", "documents", "train_seconds")}
      for run in runs
    ],
    "subsets": {},
  }
  for name in dict.fromkeys(about["subsets"]):
    mask, of_judged = subsets == name, subsets[judged] == name
    copying = of_judged & found[judged]
    levels, differences = {}, []
    for measure, chosen, groups in (
      ("bits", mask, concepts[mask]),
      ("right", of_judged, concepts[judged][of_judged]),
      ("copied", copying, concepts[judged][copying]),
    ):
      values = _values(runs, measure, chosen)
      levels[measure] = {key: _level(by_seed, groups) for key, by_seed in values.items()}
      differences += [
        {"measure": measure, "first": a, "second": b, **_difference(values[a], values[b], groups)}
        for a, b in COMPARISONS
        if values.get(a, {}).keys() & values.get(b, {}).keys()
      ]
    copier = {
      key: float(np.mean(np.asarray(values, np.float64)[copier_subsets == name]))
      for key, values in about["copier"].items()
    }
    result["subsets"][name] = {
      "documents": int(mask.sum()),
      "found": float(found[mask].mean()),
      "judged": int(of_judged.sum()),
      "concepts": len(set(concepts[mask])),
      "levels": levels,
      "differences": differences,
      "copier": copier,
    }
  return result


def _row(cells) -> str:
  return f"| {' | '.join(cells)} |"


def _ends(ends, scale: float, form: str) -> str:
  """Formats an interval, or "-" if there is only one concept or seed and thus no interval."""
  if ends is None or None in ends:
    return "-"
  return f"[{format(ends[0] / scale, form)}, {format(ends[1] / scale, form)}]"


def _level_cell(level: dict | None, scale: float, form: str) -> str:
  if level is None:
    return "-"
  return (
    f"{format(level['mean'] / scale, form)} {_ends((level['low'], level['high']), scale, form)}"
  )


def markdown(result: dict) -> str:
  """Formats the result of `summarize` as Markdown, with two tables for each subset."""
  lines = []
  for name, subset in result["subsets"].items():
    copier = subset["copier"]
    lines += [
      f"**{name}**: {subset['documents']} held-out scenes of {subset['concepts']} concepts, "
      f"{subset['judged']} of them judged. {subset['found']:.1%} have a neighbor. It shows the "
      "objects of "
      f"{copier['neighbor_shows_the_objects']:.1%}; copied whole, it is correct for "
      f"{copier['right']:.1%}; the originals have {copier['original_copied']:.1%} of its ink.",
      "",
      _row(("decoder", "after", "bits an image code", "wholly correct", "neighbor's ink copied")),
      _row(["---"] * 5),
    ]
    levels = subset["levels"]
    for key, bits in levels["bits"].items():
      condition, kind = key.split("/")
      right, copied = levels["right"].get(key), levels["copied"].get(key)
      lines.append(
        _row(
          (
            result["labels"][condition],
            NAMES[kind],
            f"{_level_cell(bits, result['image_codes'], '.3f')}, {bits['mean']:.1f} an image",
            _level_cell(right, 1, ".1%"),
            _level_cell(copied, 1, ".1%"),
          )
        )
      )
    lines += [
      "",
      _row(("measure", "difference", "value", "95% over concepts", "95% over seeds", "relative")),
      _row(["---"] * 6),
    ]
    lines += [_difference_row(d, result) for d in subset["differences"]]
    lines.append("")
  return "\n".join(lines)


def _difference_row(d: dict, result: dict) -> str:
  bits = d["measure"] == "bits"
  scale, form = (result["image_codes"], "+.3f") if bits else (1, "+.1%")

  def side(key):
    condition, kind = key.split("/")
    return f"{result['labels'][condition]}, {NAMES[kind]}"

  return _row(
    (
      MEASURES[d["measure"]],
      f"({side(d['first'])}) - ({side(d['second'])})",
      format(d["mean"] / scale, form),
      _ends((d["low"], d["high"]), scale, form),
      _ends(d["seeds"], scale, form),
      f"{d['relative']:+.0%}" if bits else "",
    )
  )

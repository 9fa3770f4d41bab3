"""Summarizes the bits of all runs of the retrieval ablation: numbers, a table and a plot."""

# n held-out documents. The seeds of a condition have the order of its runs.

import dataclasses
import os

from matplotlib.figure import Figure
import numpy as np
from scipy import stats

from cm3leon_jax.evaluation.intervals import mean_interval

SUBSETS = {"drawn_by_others": "drawn by others", "new": "new"}  # Subset -> its title.
MEANING = {
  "drawn_by_others": "the bank has the concept in another style",
  "new": "the bank has nothing of the concept",
}
COMPARISONS = (("1", "0"), ("2", "0"), ("2", "shuffled"), ("shuffled", "0"))


@dataclasses.dataclass(frozen=True)
class Run:
  """The result of one run.

  Attributes:
    condition, seed: identify the run.
    image_bits, image_codes: [n] bits of the image codes of each held-out document, and the number
      of these codes.
    text_bits, text_tokens: [n] bits of the caption tokens of each held-out document, and the number
      of these tokens.
    query_documents: number of training samples; each ends with one document after its neighbors.
    train_seconds: duration of the training.
  """

  condition: str
  seed: int
  image_bits: np.ndarray
  image_codes: np.ndarray
  text_bits: np.ndarray
  text_tokens: np.ndarray
  query_documents: int
  train_seconds: float


def spread(values) -> dict:
  """Returns mean, sample standard deviation (None for one value) and the values themselves."""
  values = [float(v) for v in values]
  deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
  return {"mean": float(np.mean(values)), "standard_deviation": deviation, "values": values}


def difference(runs: list[Run], others: list[Run], mask, concepts) -> dict:
  """Computes the mean difference in bits per image code, `runs` - `others`, over common seeds.

  Returns:
    {"bits", "concepts", "groups", "effective_groups", "by_seed", "seeds"}. `concepts` and `seeds`
    are 95% intervals (low, high), or None for a single concept or seed. `concepts` is a bootstrap
    over the `groups` concepts and covers other images. `seeds` is Student's t over seeds and covers
    other trainings. `by_seed` has the difference for each seed.
  """
  pairs = [(a, b) for a in runs for b in others if a.seed == b.seed]
  codes = pairs[0][0].image_codes[mask]
  deltas = [(a.image_bits - b.image_bits)[mask] for a, b in pairs]
  interval = mean_interval(np.mean(deltas, 0), codes, concepts[mask])
  by_seed = [float(delta.sum() / codes.sum()) for delta in deltas]
  return {
    "bits": interval["mean"],
    "concepts": None if interval["low"] is None else (interval["low"], interval["high"]),
    "groups": interval["groups"],
    "effective_groups": interval["effective_groups"],
    "by_seed": by_seed,
    "seeds": student_interval(by_seed),
  }


def student_interval(values) -> tuple[float, float] | None:
  """Computes the 95% interval of a mean of few values with Student's t; None for one value.

  student_interval([1, 2, 3]) = (-0.484, 4.484): 2 -+ 4.303 x 1 / sqrt(3)
  """
  if len(values) < 2:
    return None
  half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
  return float(np.mean(values) - half), float(np.mean(values) + half)


def summarize(
  runs: list[Run], labels: dict[str, str], subsets: dict[str, np.ndarray], concepts: np.ndarray
) -> dict:
  """Computes all numbers of the table.

  Args:
    runs: runs of any conditions and seeds.
    labels: condition -> label in the table, in the order of the rows.
    subsets: name of `SUBSETS` -> [n] bool.
    concepts: [n], equal for documents with the same concept.
  """
  of = {condition: [r for r in runs if r.condition == condition] for condition in labels}
  of = {condition: members for condition, members in of.items() if members}
  conditions = []
  for condition, members in of.items():
    image = {
      s: spread(r.image_bits[m].sum() / r.image_codes[m].sum() for r in members)
      for s, m in subsets.items()
    }
    text = {
      s: spread(r.text_bits[m].sum() / r.text_tokens[m].sum() for r in members)
      for s, m in subsets.items()
    }
    conditions.append(
      {
        "condition": condition,
        "label": labels[condition],
        "seeds": [r.seed for r in members],
        "bits_per_image_code": image,
        "bits_per_caption_token": text,
        "query_documents": round(np.mean([r.query_documents for r in members])),
        "train_seconds": round(np.mean([r.train_seconds for r in members])),
      }
    )
  seeds = {condition: {r.seed for r in of.get(condition, ())} for condition in labels}
  differences = [
    {
      "label": f"({labels[a]}) - ({labels[b]})",
      "subset": s,
      **difference(of[a], of[b], mask, concepts),
    }
    for a, b in COMPARISONS
    if seeds.get(a, set()) & seeds.get(b, set())
    for s, mask in subsets.items()
  ]
  counts = {
    s: {"documents": int(m.sum()), "concepts": len(np.unique(concepts[m]))}
    for s, m in subsets.items()
  }
  return {"heldout": counts, "conditions": conditions, "differences": differences}


def verdict(delta: dict) -> str:
  """Returns what a difference shows; both intervals must be on the same side of 0."""
  if delta["seeds"] is None:
    return "one seed shows nothing"
  if delta["concepts"] is None:
    return "one concept shows nothing"
  ends = (*delta["concepts"], *delta["seeds"])
  if max(ends) < 0:
    return "fewer bits"
  return "more bits" if min(ends) > 0 else "no clear difference"


def _interval(ends: tuple[float, float] | None) -> str:
  return f"[{ends[0]:+.3f}, {ends[1]:+.3f}]" if ends else "-"


def _cell(value: dict) -> str:
  deviation = value["standard_deviation"]
  return f"{value['mean']:.3f}" + (f" ± {deviation:.3f}" if deviation is not None else "")


def markdown(result: dict) -> str:
  """Returns the result of `summarize` as Markdown: the held-out subsets and two tables."""
  counts = result["heldout"]
  lines = [
    f"{SUBSETS[s]}: {MEANING[s]}; {n['documents']} drawings, {n['concepts']} concepts."
    for s, n in counts.items()
  ]
  header = ["neighbors", "seeds", *(f"bits per image code, {SUBSETS[s]}" for s in counts)]
  header += [f"bits per caption token, {SUBSETS[s]}" for s in counts] + [
    "query documents",
    "training (s)",
  ]
  lines += ["", _row(header), _row(["---"] * len(header))]
  for c in result["conditions"]:
    cells = [
      _cell(c[f"bits_per_{unit}"][s]) for unit in ("image_code", "caption_token") for s in counts
    ]
    lines.append(
      _row(
        [
          c["label"],
          str(len(c["seeds"])),
          *cells,
          f"{c['query_documents']:,}",
          f"{c['train_seconds']:,}",
        ]
      )
    )
  if result["differences"]:
    header = [
      "bits per image code",
      "held out",
      "difference",
      "95% over concepts",
      "95% over seeds",
      "by seed",
      "shows",
    ]
    lines += ["", _row(header), _row(["---"] * len(header))]
  for d in result["differences"]:
    seeds = ", ".join(f"{x:+.3f}" for x in d["by_seed"])
    intervals = [_interval(d["concepts"]), _interval(d["seeds"])]
    lines.append(
      _row([d["label"], SUBSETS[d["subset"]], f"{d['bits']:+.3f}", *intervals, seeds, verdict(d)])
    )
  return "\n".join(lines) + "\n"


def _row(cells: list[str]) -> str:
  return f"| {' | '.join(cells)} |"


def plot(result: dict, path: str | os.PathLike) -> None:
  """Plots bits per image code: a dot per seed, a line at their mean, a panel per subset."""
  subsets, conditions = list(result["heldout"]), result["conditions"]
  figure = Figure(figsize=(4.6 * len(subsets), 3.4), layout="constrained")
  for axis, subset in zip(figure.subplots(1, len(subsets), sharey=True, squeeze=False)[0], subsets):
    for place, condition in enumerate(conditions):
      bits = condition["bits_per_image_code"][subset]
      color = "tab:gray" if condition["condition"] == "shuffled" else "tab:blue"
      axis.hlines(bits["mean"], place - 0.28, place + 0.28, color=color, linewidth=2)
      axis.scatter(
        [place] * len(bits["values"]), bits["values"], color=color, s=28, alpha=0.7, linewidths=0
      )
    count = result["heldout"][subset]
    axis.set_title(
      f"{SUBSETS[subset]} ({count['documents']} drawings, {count['concepts']} concepts)",
      fontsize=10,
    )
    axis.set_xticks(range(len(conditions)), [c["label"].replace(", ", ",\n") for c in conditions])
    axis.set_xlim(-0.6, len(conditions) - 0.4)
    axis.grid(axis="y", linewidth=0.5, alpha=0.5)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(axis="x", length=0)
    axis.margins(y=0.15)
  figure.axes[0].set_ylabel("held-out bits per image code")
  figure.savefig(path, dpi=150)

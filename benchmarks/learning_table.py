"""Summarizes the runs of `benchmarks.learning` as a table and a figure."""

from collections.abc import Sequence

from matplotlib.figure import Figure
import numpy as np

from cm3leon_jax.evaluation.intervals import mean_interval

HALVES = ("choose", "report")
TITLES = {
  "color named": "unseen color",
  "one object": "one object",
  "no color named": "unseen color, not named",
  "objects never together": "never together",
  "new claims": "claims never made",
  "claims of training": "claims made",
  "rare": "rare",
  "rare moved": "moved",
}
SHOWN = ("color named", "one object", "objects never together", "new claims", "rare")
ENDS = ("low", "high")
BITS = {"own": "same place", "own elsewhere": "another place", "none": "no document"}


def table(runs: Sequence[dict]) -> dict:
  """Returns half -> condition -> column -> mean over the seeds, with an interval over concepts."""
  result: dict = {half: {} for half in HALVES}
  for condition in dict.fromkeys(run["condition"] for run in runs):
    own = [run for run in runs if run["condition"] == condition]
    for half in HALVES:
      result[half][condition] = {"seeds": [run["seed"] for run in own], **_columns(own, half)}
  return result


def _columns(runs: Sequence[dict], half: str) -> dict:
  rows = [row for run in runs for row in run["rows"] if row["half"] == half]
  for row in list(rows):
    if row["group"] == "color named" and ", " not in row["concept"]:
      rows.append({**row, "group": "one object"})
  found = {}
  for group in TITLES:
    for measure in ("right", "lookup"):
      of = [row for row in rows if row["group"] == group]
      found[f"{group}/{measure}"] = _interval(
        [row[measure] for row in of], [row["concept"] for row in of]
      )
  for name in BITS:
    of = [
      (value, concept)
      for run in runs
      for value, concept, own in zip(run["bits"][name], run["concepts"], run["halves"])
      if own == half
    ]
    found[f"bits/{name}"] = _interval(*zip(*of))
  return found


def _interval(values: Sequence[float], concepts: Sequence[str]) -> dict:
  found = mean_interval(np.asarray(values, float), np.ones(len(values)), list(concepts))
  return {name: found[name] for name in ("mean", "low", "high")} | {"count": len(values)}


def markdown(result: dict) -> str:
  """Formats the table of each half."""
  lines = []
  for half in HALVES:
    titles = [f"half: {half}", *TITLES.values(), *(f"bits: {name}" for name in BITS.values())]
    lines += [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    for condition, found in result[half].items():
      cells = [f"{condition} ({len(found['seeds'])} seeds)"]
      cells += [_percent(found[f"{group}/right"], found[f"{group}/lookup"]) for group in TITLES]
      cells += [f"{found[f'bits/{name}']['mean']:.3f}" for name in BITS]
      lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
  return "\n".join(lines)


def _percent(right: dict, lookup: dict) -> str:
  text = f"{right['mean']:.1%}"
  if right["low"] is not None:
    text += f" [{100 * right['low']:.0f}, {100 * right['high']:.0f}]"
  return f"{text}, lookup {lookup['mean']:.0%}"


def figure_of(runs: Sequence[dict]) -> Figure:
  """Draws a bar per condition and set of captions of the half "report".

  A bar is the mean over seeds, with its interval over concepts; a dot is one seed. A line across a
  bar is the lookup.
  """
  means = table(runs)["report"]
  figure = Figure(figsize=(9, 3.2), layout="constrained")
  axes = figure.subplots()
  width = 0.8 / len(means)
  for i, (condition, found) in enumerate(means.items()):
    own = [run for run in runs if run["condition"] == condition]
    at = np.arange(len(SHOWN)) + (i - (len(means) - 1) / 2) * width
    right, lookup = (
      [found[f"{group}/{measure}"] for group in SHOWN] for measure in ("right", "lookup")
    )
    middle = np.array([100 * one["mean"] for one in right])
    ends = [[one["mean"] if one[end] is None else one[end] for one in right] for end in ENDS]
    errors = np.abs(100 * np.array(ends) - middle)
    axes.bar(at, middle, width, label=condition, yerr=errors, error_kw={"linewidth": 0.8})
    for run in own:
      shares = _columns([run], "report")
      dots = [100 * shares[f"{group}/right"]["mean"] for group in SHOWN]
      axes.plot(at, dots, ".", color="black", markersize=4)
    lines = [100 * one["mean"] for one in lookup]
    axes.hlines(lines, at - width / 2, at + width / 2, color="tab:red", linewidth=1.5)
  axes.set_xticks(range(len(SHOWN)), [TITLES[group] for group in SHOWN])
  axes.set_ylabel("correct images (%)")
  axes.set_ylim(0, 105)
  figure.legend(loc="outside upper center", ncols=len(means))
  return figure

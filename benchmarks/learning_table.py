"""Summarizes the runs of `benchmarks.learning` as a table."""

from collections.abc import Sequence

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

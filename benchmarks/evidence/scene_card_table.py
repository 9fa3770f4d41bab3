"""Computes shares with confidence intervals from the results of `scene_card`, and formats them."""

# n captions.

from collections.abc import Sequence

import numpy as np

from cm3leon_jax.evaluation.intervals import mean_interval

# Kind of document before the image of a rare object -> name in the table.
NEIGHBORS = {
  "own": "its own document, at the same place",
  "own, beside": "its own document, beside that place",
  "own, above or below": "its own document, above or below it",
  "own, diagonal": "its own document, diagonal to it",
  "another's": "another object's, at the same place",
  "none": "none",
}
TITLES = {
  "new claims": "new scenes of known parts whose claims no training caption makes",
  "claims of training": "new scenes of known parts whose claims a training caption makes",
  "objects never together": "two objects that training never shows together",
  "color named": "an object in a color it never had, the color named",
  "no color named": "an object in a color it never had, no color named",
  "rare": "objects never seen, after the bank's document",
  "rare, beside": "the same, after the document that shows the object beside that place",
  "rare, above or below": "the same, after the document that shows it above or below that place",
  "rare, diagonal": "the same, after the document that shows it diagonally to that place",
}


def _level(values, concepts: Sequence[str]) -> dict:
  interval = mean_interval(np.asarray(values, float), np.ones(len(values)), list(concepts))
  return {name: interval[name] for name in ("mean", "low", "high", "groups")}


def row(results: list[dict], concepts: Sequence[str]) -> dict:
  """Computes, for each measure, the share of captions for which it is true.

  Args:
    results: for each of n captions, measure -> whether it is true. All have the same measures.
    concepts: [n]; captions of the same concept are not independent.
  """
  shares = {name: _level([one[name] for one in results], concepts) for name in results[0]}
  return {"captions": len(results), **shares}


def bits_rows(scored: dict[str, np.ndarray], concepts: Sequence[str]) -> dict:
  """Computes the mean bits per code for each condition, and its difference from "none"."""
  rows = {}
  for condition, values in scored.items():
    rows[condition] = _level(values, concepts)
    rows[condition]["minus_none"] = _level(values - scored["none"], concepts)
  return rows


def percent(level: dict) -> str:
  """Formats a share with its confidence interval: "65.7% [60.4, 70.9]"."""
  text = f"{level['mean']:.1%}"
  if level["low"] is None or level["low"] == level["high"]:
    return text
  return f"{text} [{100 * level['low']:.1f}, {100 * level['high']:.1f}]"


def _bits(level: dict, sign: str = "") -> str:
  low, high = level["low"], level["high"]
  text = f"{level['mean']:{sign}.3f}"
  return text if low is None else f"{text} [{low:{sign}.3f}, {high:{sign}.3f}]"


def markdown(result: dict) -> str:
  """Formats the results as Markdown tables."""
  groups = result["groups"]
  lines = [
    "| captions | wholly correct | a lookup | codes pasted | captions that stand in training |",
    "|---|---|---|---|---|",
  ]
  for group, found in groups.items():
    cells = [f"{TITLES.get(group, group)} ({found['captions']})"]
    cells += [percent(found[name]) for name in ("right", "lookup", "pasted", "trained")]
    lines.append(f"| {' | '.join(cells)} |")
  columns = {
    "neighbor": "its document is found",
    "right": "wholly correct",
    "clear": "the same, shapes that score 0.90 or more",
    "object": "the object is drawn",
  }
  lines += ["", f"| rare objects | {' | '.join(columns.values())} |", "|---" * 5 + "|"]
  for group in (name for name in groups if name.startswith("rare")):
    cells = [percent(groups[group][name]) for name in columns]
    lines.append(f"| {TITLES[group]} | {' | '.join(cells)} |")
  lines += ["", "| document before a rare object | bits a code | minus none |", "|---|---|---|"]
  for condition, level in result["bits"].items():
    cells = [NEIGHBORS[condition], _bits(level), _bits(level["minus_none"], "+")]
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines) + "\n"

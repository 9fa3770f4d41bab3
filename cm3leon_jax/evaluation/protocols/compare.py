"""Compares two evaluations of the same protocol, example by example where possible."""

from typing import Any

from etils import epath
import numpy as np

from cm3leon_jax.errors import UserError
from cm3leon_jax.evaluation import intervals
from cm3leon_jax.evaluation.protocols.results import RESULTS
from cm3leon_jax.evaluation.protocols.run import VALUES
from cm3leon_jax.files.json_files import read_json
from cm3leon_jax.stages import stages

# Both evaluations must have equal values in these fields. Other fields may differ.
SAME = ("protocol", "data")
# These fields must be equal too, unless one of them is None because no metric uses the network.
NETWORKS = ("extractor", "scorer")


def compare(first: epath.PathLike, second: epath.PathLike, num_resamples: int = 10_000) -> list:
  """Computes second - first for each metric that both evaluations have.

  Means over examples are compared example by example, so that the difficulty of an example cancels.
  Their confidence intervals resample groups of examples. Distances and BLEU have no interval.

  Returns {"column", "metric", "first", "second", "difference", "low", "high"} per column and
  metric. `low` and `high` are None if there is no interval.

  Raises:
    UserError: a folder has no results, or the protocol, data or networks differ.
  """
  for folder in (first, second):
    if not (epath.Path(folder) / RESULTS).exists():
      raise UserError(
        f"{folder} is not the folder of an evaluation, because it has no {RESULTS}: give two "
        "folders of W/evaluations."
      )
  fields = {"columns": dict, "protocol": dict}
  results = [read_json(epath.Path(folder) / RESULTS, fields) for folder in (first, second)]
  for field in (*SAME, *NETWORKS):
    values = [result.get(field) for result in results]
    if values[0] != values[1] and (field in SAME or None not in values):
      where = ""
      if isinstance(values[0], dict) and isinstance(values[1], dict):
        where = f" ({'; '.join(stages.differences(*values)[:3])})"
      raise UserError(
        f"{first} and {second} differ in {field}{where}: evaluations can be compared only if "
        "their protocol, data, extractor and CLIP are the same."
      )
  values = [read_values(folder) for folder in (first, second)]
  rows: list[dict[str, Any]] = []
  for column, of_column in results[0]["columns"].items():
    for metric, found in of_column["metrics"].items():
      other = results[1]["columns"][column]["metrics"].get(metric)
      if other is None or None in (found["value"], other["value"]):
        continue
      row = {"column": column, "metric": metric, "first": found["value"], "second": other["value"]}
      row |= {"difference": other["value"] - found["value"], "low": None, "high": None}
      pair = [of[name] for of in values if (name := f"{column}/{metric}/values") in of]
      if len(pair) == 2:
        row |= paired(pair[0], pair[1], values[0]["groups"], num_resamples)
      rows.append(row)
  return rows


def read_values(folder: epath.PathLike) -> dict[str, np.ndarray]:
  """Reads the values per example of an evaluation, by column and metric."""
  with (epath.Path(folder) / VALUES).open("rb") as file, np.load(file) as stored:
    return {name: stored[name] for name in stored.files}


def paired(
  first: np.ndarray, second: np.ndarray, groups: np.ndarray, num_resamples: int
) -> dict[str, Any]:
  """Computes the mean difference, with an interval, over the examples that have both values."""
  both = ~np.isnan(first) & ~np.isnan(second)
  if not both.any():
    return {}
  apart = (second - first)[both]
  found = intervals.mean_interval(apart, np.ones(len(apart)), groups[both], num_resamples)
  return {"difference": found["mean"], "low": found["low"], "high": found["high"]}


def describe(rows: list[dict]) -> str:
  """Formats the result of `compare` as text, one line per column and metric."""
  lines = []
  for row in rows:
    interval = "" if row["low"] is None else f" [{row['low']:+.4g}, {row['high']:+.4g}]"
    lines.append(
      f"{row['column']}, {row['metric']}: {row['first']:.4g} -> {row['second']:.4g}, "
      f"{row['difference']:+.4g}{interval}"
    )
  return "\n".join(lines)

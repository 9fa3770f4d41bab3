"""Summarizes the runs of `scaling`: power laws, predictions, ratios of FLOPs, tables and a plot."""

# n held-out documents, of which m are judged. P sizes, R resamples.

import os

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
import numpy as np

from benchmarks import scaling_fit as fit

IMAGES = {"all": "all", "rare": "rare", "common": "common"}  # Subset -> name in the tables.
COLORS = {"neighbors": "tab:blue", "without": "tab:gray"}


def plan(sizes: list[dict]) -> str:
  """Formats the results of `scaling.describe` as a table with a row per size."""
  lines = [
    _row(("size", "parameters", "learning rate", "steps", "tokens", "FLOPs")),
    _row(["---"] * 6),
  ]
  lines += [
    _row(
      (
        s["size"],
        f"{s['parameters']:,}",
        f"{s['learning_rate']:g}",
        f"{s['steps']:,}",
        f"{s['tokens']:,}",
        f"{s['flops']:.3g}",
      )
    )
    for s in sizes
  ]
  return "\n".join(lines) + "\n"


def _points(about: dict, runs: list[dict], measure: str, mask: np.ndarray) -> dict[str, dict]:
  """Returns condition -> size -> seeds and values [S, n] of a measure, for documents in `mask`."""
  found: dict[str, dict] = {}
  for condition in about["labels"]:
    for size in about["sizes"]:
      of = [r for r in runs if (r["condition"], r["size"]) == (condition, size["size"])]
      if of:
        values = np.array([r[measure] for r in of], np.float64)[:, mask]
        found.setdefault(condition, {})[size["size"]] = {
          "seeds": [r["seed"] for r in of],
          "values": values,
        }
  return found


def _resampled(points: dict[str, dict], groups) -> dict[str, np.ndarray]:
  """Resamples seeds and documents (the same for all conditions): condition -> means [R, P]."""
  keys = [(condition, size) for condition, of in points.items() for size in of]
  if not keys or not len(groups):
    return {}
  values = [points[condition][size]["values"] for condition, size in keys]
  means = fit.resampled_means(values, groups, np.random.default_rng(0), fit.NUM_RESAMPLES)
  return {
    condition: means[:, [i for i, key in enumerate(keys) if key[0] == condition]]
    for condition in points
  }


def _levels(of: dict, means: np.ndarray) -> list[dict]:
  """Returns, for each size, the mean, its confidence interval, and the mean of each seed."""
  ends = [fit.interval(column) for column in means.T]
  return [
    {
      "size": size,
      "mean": float(point["values"].mean()),
      "low": low,
      "high": high,
      "by_seed": point["values"].mean(1).tolist(),
    }
    for (size, point), (low, high) in zip(of.items(), ends)
  ]


def _law(flops: list[float], levels: list[dict], means: np.ndarray):
  """Fits laws to the means and to the resampled means; returns JSON values and both laws.

  All three results are None if there are too few sizes.
  """
  if len(levels) < fit.LEAST_SIZES:
    return None, None, None
  bits = [level["mean"] for level in levels]
  floor = fit.needs_floor(flops, bits)
  law, laws = fit.fit(flops, bits, floor), fit.fit(flops, means, floor)
  plain = {
    "with_floor": floor,
    "reference": law.reference,
    "floor": float(law.floor),
    "scale": float(law.scale),
    "exponent": float(law.exponent),
    "exponent_interval": fit.interval(laws.exponent),
    "sizes": [level["size"] for level in levels],
  }
  return plain, law, laws


def _flops(about: dict, of: dict) -> list[float]:
  """Returns the training FLOPs of each size in `of`."""
  by_size = {s["size"]: s["flops"] for s in about["sizes"]}
  return [by_size[size] for size in of]


def _masks(about: dict) -> dict[str, np.ndarray]:
  """Returns, for each subset in `IMAGES`, a boolean mask [n] of the documents that belong to it."""
  subsets = np.array(about["subsets"])
  return {name: (subsets == name) | (name == "all") for name in IMAGES}


def predictions(about: dict, runs: list[dict]) -> dict:
  """Predicts the bits of the size that is not in `runs`, for each subset and condition.

  `fit.needs_floor` decides whether the law has a floor. The predictions of both kinds of law are
  returned, too.

  Args:
    about: see `summarize`.
    runs: results of `scaling.run_one`, without the predicted size.

  Returns:
    {"series": {"rare/neighbors": {"bits", "low", "high", "law", "without_floor", "with_floor"}}}.
    "low" and "high" are from resampled documents and seeds of the fitted runs.
  """
  target = next(s for s in about["sizes"] if s["size"] == about["predicted"])["flops"]
  concepts, series = np.array(about["concepts"]), {}
  for name, mask in _masks(about).items():
    points = _points(about, runs, "bits", mask)
    means = _resampled(points, concepts[mask])
    for condition, of in points.items():
      flops, levels = _flops(about, of), _levels(of, means[condition])
      plain, law, laws = _law(flops, levels, means[condition])
      if plain is None:
        continue
      low, high = fit.interval(laws.bits(target))
      both = {
        key: float(fit.fit(flops, [level["mean"] for level in levels], floor).bits(target))
        for key, floor in (("without_floor", False), ("with_floor", True))
      }
      of_law = {"bits": float(law.bits(target)), "low": low, "high": high, "law": plain}
      series[f"{name}/{condition}"] = {**of_law, **both}
  return {"series": series}


def summarize(about: dict, runs: list[dict], predicted: dict | None) -> dict:
  """Computes all numbers that the tables and the plot show.

  Args:
    about: `subsets` and `concepts`, [n] names for each document; `judged`, [m] indices of the
      judged documents; `labels`, condition -> name in the tables; `sizes`, results of
      `scaling.describe`, ascending; `predicted`, the size whose bits are predicted.
    runs: results of `scaling.run_one`.
    predicted: content of predictions.json, or None before it is written.
  """
  concepts, judged = np.array(about["concepts"]), np.array(about["judged"])
  seconds = {
    s["size"]: [r["train_seconds"] for r in runs if r["size"] == s["size"]] for s in about["sizes"]
  }
  result: dict = {
    "labels": about["labels"],
    "predicted": about["predicted"],
    "sizes": [{**s, "train_seconds": seconds[s["size"]]} for s in about["sizes"]],
    "images": {},
  }
  for name, mask in _masks(about).items():
    points = _points(about, runs, "bits", mask)
    means = _resampled(points, concepts[mask])
    of_judged = mask[judged]
    right = {} if name == "all" else _points(about, runs, "right", of_judged)
    right_means = _resampled(right, concepts[judged][of_judged])
    series, laws = {}, {}
    for condition, of in points.items():
      levels = _levels(of, means[condition])
      plain, *laws[condition] = _law(_flops(about, of), levels, means[condition])
      series[condition] = {"bits": levels, "law": plain}
      if condition in right:
        series[condition]["right"] = _levels(right[condition], right_means[condition])
    result["images"][name] = {
      "documents": int(mask.sum()),
      "concepts": len(set(concepts[mask])),
      "judged": int(of_judged.sum()) if right else 0,
      "series": series,
      "ratios": _ratios(about, points, laws),
      "predictions": _errors(name, series, about, predicted),
    }
  return result


def _ratios(about: dict, points: dict[str, dict], laws: dict) -> list[dict]:
  """Computes `fit.ratio` for each condition's best bits, with intervals; [] without two laws."""
  if {*laws} != {"neighbors", "without"} or None in (laws["neighbors"][0], laws["without"][0]):
    return []
  flops = [_flops(about, of) for of in points.values()]
  # The range of FLOPs in which both conditions have runs.
  measured = max(min(f) for f in flops), min(max(f) for f in flops)
  rows = []
  for of in ("without", "neighbors"):
    other = "neighbors" if of == "without" else "without"
    point = {
      key: float(value)
      for key, value in fit.ratio(laws["without"][0], laws["neighbors"][0], measured, of).items()
    }
    many = fit.ratio(laws["without"][1], laws["neighbors"][1], measured, of)["ratio"]
    low, high = fit.interval(many)
    beyond = fit.bound(point[f"flops_{other}"], measured)
    rows.append({"best_of": of, **point, "low": low, "high": high, "beyond": beyond})
    if beyond:  # The FLOPs are extrapolated; the end of the range gives a bound.
      end = measured[0] if beyond == "below" else measured[1]
      ends = (measured[1], end) if of == "without" else (end, measured[1])
      rows[-1]["bound"] = ends[0] / ends[1]
  return rows


def _errors(name: str, series: dict, about: dict, predicted: dict | None) -> dict[str, dict]:
  """Returns condition -> prediction, with measured bits and the error if the size is trained."""
  result = {}
  for condition, of in series.items():
    row = (predicted or {"series": {}})["series"].get(f"{name}/{condition}")
    if row is None:
      continue
    result[condition] = dict(row)
    done = [level for level in of["bits"] if level["size"] == about["predicted"]]
    if done:
      result[condition]["measured"] = done[0]["mean"]
      result[condition]["error"] = row["bits"] / done[0]["mean"] - 1
  return result


def _row(cells) -> str:
  return f"| {' | '.join(cells)} |"


def _cell(levels: dict[str, dict], size: str, form: str) -> str:
  """Formats the mean and the confidence interval of a size, or "-" if it is not trained yet."""
  level = levels.get(size)
  if level is None:
    return "-"
  return f"{level['mean']:{form}} [{level['low']:{form}}, {level['high']:{form}}]"


def markdown(result: dict) -> str:
  """Formats the result of `summarize` as Markdown."""
  lines = [_row(("size", "parameters", "steps", "FLOPs", "runs", "training (s)"))]
  lines.append(_row(["---"] * 6))
  for s in result["sizes"]:
    seconds = s["train_seconds"]
    mean = f"{np.mean(seconds):.0f}" if seconds else "-"
    about = (f"{s['parameters']:,}", f"{s['steps']:,}", f"{s['flops']:.3g}")
    lines.append(_row((s["size"], *about, str(len(seconds)), mean)))
  for name, images in result["images"].items():
    lines += ["", *_levels_table(name, images, result)]
  lines += ["", *_laws_table(result), "", *_ratios_table(result)]
  return "\n".join(lines) + "\n"


def _levels_table(name: str, images: dict, result: dict) -> list[str]:
  series, measures = images["series"], [("bits", "bits an image", ".2f")]
  if images["judged"]:
    measures.append(("right", "wholly correct", ".1%"))
  columns = [
    (f"{title}, {result['labels'][c]}", {level["size"]: level for level in of[measure]}, form)
    for measure, title, form in measures
    for c, of in series.items()
  ]
  lines = [
    f"**{IMAGES[name]}**: {images['documents']} held-out images of {images['concepts']} concepts"
    + (f", {images['judged']} of them judged." if images["judged"] else "."),
    "",
    _row(["size", *(title for title, _, _ in columns)]),
    _row(["---"] * (1 + len(columns))),
  ]
  for s in result["sizes"]:
    cells = [_cell(levels, s["size"], form) for _, levels, form in columns]
    lines.append(_row([s["size"], *cells]))
  return lines


def describe_law(law: dict) -> str:
  """Formats a law: "3.10 + 20.50 x (C / 4.1e+12)^-0.310"."""
  floor = f"{law['floor']:.2f} + " if law["with_floor"] else ""
  return f"{floor}{law['scale']:.2f} x (C / {law['reference']:.2g})^{-law['exponent']:.3f}"


def _laws_table(result: dict) -> list[str]:
  head = ("images", "decoder", "law of the runs so far", "95% of the exponent")
  lines = [_row((*head, f"predicted for {result['predicted']}", "measured", "error"))]
  lines.append(_row(["---"] * 7))
  for name, images in result["images"].items():
    for condition, of in images["series"].items():
      law, row = of["law"], images["predictions"].get(condition)
      cells = ["-", "-"]
      if law:
        low, high = law["exponent_interval"]
        cells = [describe_law(law), f"[{-high:.3f}, {-low:.3f}]"]
      cells.append(f"{row['bits']:.2f} [{row['low']:.2f}, {row['high']:.2f}]" if row else "-")
      done = row is not None and "measured" in row
      cells += [f"{row['measured']:.2f}", f"{row['error']:+.1%}"] if done else ["-", "-"]
      lines.append(_row((IMAGES[name], result["labels"][condition], *cells)))
  return lines


def _ratios_table(result: dict) -> list[str]:
  lines = [_row(("images", "at the best bits of", "bits an image", "FLOPs without / with", "95%"))]
  lines.append(_row(["---"] * 5))
  for name, images in result["images"].items():
    for row in images["ratios"]:
      ends = f"[{_times(row['low'])}, {_times(row['high'])}]"
      label = f"the decoders {result['labels'][row['best_of']]}"
      cells = (IMAGES[name], label, f"{row['bits']:.2f}", describe_ratio(row), ends)
      lines.append(_row(cells))
  return lines


def _times(ratio: float) -> str:
  if np.isinf(ratio):
    return "never"
  return f"{ratio:.2f}x" if ratio < 1_000 else f"{ratio:.1g}x"


def describe_ratio(row: dict) -> str:
  """Formats a ratio of FLOPs; an extrapolated ratio follows the bound that was measured.

  "2.10x", "more than 4.00x (extrapolated: 9.30x)", "less than 1.00x (extrapolated: 0.31x)". The
  word "never" means that the law without retrieval never reaches the bits.
  """
  if not row["beyond"]:
    return _times(row["ratio"])
  # The ratio exceeds the bound if its denominator is below the range or its numerator is above it.
  more = (row["beyond"] == "below") == (row["best_of"] == "without")
  side = "more than" if more else "less than"
  return f"{side} {row['bound']:.2f}x (extrapolated: {_times(row['ratio'])})"


def plot(result: dict, path: str | os.PathLike) -> None:
  """Plots bits and shares of correct images over FLOPs. Lines are laws, rings are predictions."""
  flops = {s["size"]: s["flops"] for s in result["sizes"]}
  figure = Figure(figsize=(4.4 * len(result["images"]), 6.4), layout="constrained")
  axes = figure.subplots(2, len(result["images"]), squeeze=False)
  for (upper, lower), (name, images) in zip(axes.T, result["images"].items()):
    for condition, of in images["series"].items():
      style = {"color": COLORS[condition], "label": result["labels"][condition]}
      _plot_levels(upper, flops, of["bits"], style)
      if of["law"]:
        x = np.geomspace(min(flops.values()), max(flops.values()), 50)
        law = of["law"]
        y = law["floor"] + law["scale"] * (x / law["reference"]) ** -law["exponent"]
        upper.plot(x, y, color=style["color"], linewidth=1)
      if condition in images["predictions"]:
        bits = images["predictions"][condition]["bits"]
        ring = {"facecolors": "none", "edgecolors": style["color"], "s": 70}
        upper.scatter([flops[result["predicted"]]], [bits], **ring)
      if "right" in of:
        _plot_levels(lower, flops, of["right"], style)
    upper.set_title(f"{IMAGES[name]} ({images['documents']} images)", fontsize=10)
    upper.set(xscale="log", yscale="log", ylabel="held-out bits an image")
    lower.set(xscale="log", xlabel="training FLOPs", ylabel="share judged wholly correct")
    lower.set_visible(bool(images["judged"]))
    upper.legend(frameon=False, fontsize=8)
    for axis in (upper, lower):
      axis.xaxis.set_minor_formatter(NullFormatter())
      axis.grid(which="both", linewidth=0.4, alpha=0.5)
      axis.spines[["top", "right"]].set_visible(False)
  figure.savefig(path, dpi=150)


def _plot_levels(axis, flops: dict, levels: list[dict], style: dict) -> None:
  x, mean = [flops[level["size"]] for level in levels], np.array([v["mean"] for v in levels])
  ends = [mean - [v["low"] for v in levels], [v["high"] for v in levels] - mean]
  axis.errorbar(x, mean, np.maximum(ends, 0), fmt="o", markersize=4, elinewidth=1, **style)

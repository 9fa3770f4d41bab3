"""report.html: one file that shows a run, pictures inside, nothing fetched."""

import base64
import datetime
import importlib.resources
import io
import re

from etils import epath
import jinja2
import matplotlib
from matplotlib.figure import Figure
import numpy as np
from PIL import Image

from cm3leon_jax import stages
from cm3leon_jax.data import raw_pairs
from cm3leon_jax.data.records import SPLITS
from cm3leon_jax.evaluation.intervals import describe_groups
from cm3leon_jax.io import read_json_lines, replacing, write_json
from cm3leon_jax.reports import summary as summary_lib

MAX_PROMPTS = 16
MAX_RECONSTRUCTIONS = 16
MAX_GRIDS = 8

# Colors that the page replaces by its own, light or dark.
INK, IMAGE, TEXT, FAINT = "#010203", "#040506", "#070809", "#0a0b0c"
CSS_COLORS = {
  INK: "currentColor",
  IMAGE: "var(--image)",
  TEXT: "var(--text-series)",
  FAINT: "var(--rule)",
}
STYLE = {
  "svg.fonttype": "none",
  "svg.hashsalt": "cm3leon_jax",
  "font.family": "sans-serif",
  "font.size": 10,
  **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
  "axes.edgecolor": FAINT,
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.grid": True,
  "grid.color": FAINT,
  "grid.linewidth": 0.6,
}


def png_uri(pixels) -> str:
  """[H, W, 3] uint8 -> data URI of a PNG."""
  buffer = io.BytesIO()
  Image.fromarray(np.asarray(pixels)).save(buffer, "PNG", optimize=True)
  return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def file_uri(path: epath.PathLike) -> str | None:
  """Data URI of a PNG file; None if it is not there."""
  path = epath.Path(path)
  return (
    "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    if path.is_file()
    else None
  )


def to_svg(figure: Figure) -> str:
  """Inline SVG in the page's own font and colors."""
  buffer = io.StringIO()
  figure.savefig(
    buffer, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None}
  )
  svg = re.sub(r"^.*?(?=<svg)", "", buffer.getvalue(), flags=re.DOTALL)
  svg = re.sub(
    r"(<svg[^>]*?) width=\"[^\"]*\" height=\"[^\"]*\"|(<svg[^>]*?) height=\"[^\"]*\"",
    r"\1\2",
    svg,
    count=1,
  )
  svg = re.sub(r" width=\"[\d.]+pt\"", "", svg, count=1)
  svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
  for color, css in CSS_COLORS.items():
    svg = svg.replace(color, css)
  return svg


def smooth(values: np.ndarray, window: int) -> np.ndarray:
  """Centered moving average; at the ends over what there is. [n] -> [n]."""
  kernel = np.ones(min(window, len(values)))
  total, count = (np.convolve(x, kernel, "same") for x in (values, np.ones(len(values))))
  return total / count


def loss_figure(metrics: list[dict]) -> str | None:
  """Training and held-out loss over steps, one panel a modality, in bits per target; None without a log."""
  steps = [line for line in metrics if "image_loss" in line]
  if len(steps) < 2:
    return None
  heldout = [line for line in metrics if "heldout_image_loss" in line]
  x = np.array([line["step"] for line in steps])
  with matplotlib.rc_context(STYLE):
    figure = Figure(figsize=(9, 3.1), layout="constrained")
    for axis, name, title, color in zip(
      figure.subplots(1, 2), ("image", "text"), ("Image codes", "Text tokens"), (IMAGE, TEXT)
    ):
      y = np.array([line[f"{name}_loss"] for line in steps]) / np.log(2)
      axis.plot(x, y, color=color, alpha=0.25, linewidth=0.8)
      axis.plot(
        x, smooth(y, max(len(x) // 40, 1)), color=color, linewidth=1.6, label="training (smoothed)"
      )
      held = np.array([line[f"heldout_{name}_loss"] for line in heldout]) / np.log(2)
      axis.plot(
        [line["step"] for line in heldout], held, "o", color=INK, markersize=4, label="held out"
      )
      for i, restart in enumerate(summary_lib.restarts(metrics)):
        label = "stopped, continued" if i == 0 else None
        axis.axvline(
          restart["after_step"] + 0.5, color=INK, linewidth=0.9, linestyle=(0, (4, 3)), label=label
        )
      axis.set(
        title=title,
        xlabel="step",
        ylabel="bits per target",
        ylim=(0, 1.05 * float(np.percentile(y, 99.5))),
      )
      axis.legend(frameon=False, fontsize=9)
    return to_svg(figure)


def bits_figure(evaluation: dict) -> str | None:
  """Bits per token with true, shuffled and no neighbors and their intervals, one panel a modality."""
  rows = ("true", "shuffled", "none")
  if not all(name in evaluation for name in ("image", "text")):
    return None
  with matplotlib.rc_context({**STYLE, "axes.grid.axis": "x"}):
    figure = Figure(figsize=(9, 1.7), layout="constrained")
    panels = (("image", "Bits per image code", IMAGE), ("text", "Bits per text token", TEXT))
    for axis, (name, title, color) in zip(figure.subplots(1, 2), panels):
      for place, row in enumerate(rows):
        found = evaluation[name][row]
        axis.plot(
          [found["low"], found["high"]],
          [place, place],
          color=color,
          linewidth=2.2,
          solid_capstyle="round",
        )
        axis.plot(found["bits"], place, "o", color=color, markersize=6)
      axis.set(
        title=title,
        yticks=range(len(rows)),
        yticklabels=[f"{row} neighbors".replace("none", "no") for row in rows],
      )
      axis.set_ylim(len(rows) - 0.5, -0.5)
      axis.tick_params(length=0)
    return to_svg(figure)


def reconstructions(workdir: epath.Path) -> list[tuple[str, str]]:
  """(original, reconstruction) as data URIs."""
  path = workdir / "vqgan" / "reconstructions.npz"
  if not path.exists():
    return []
  with path.open("rb") as f, np.load(f) as arrays:
    pairs = list(zip(arrays["originals"], arrays["reconstructions"]))[:MAX_RECONSTRUCTIONS]
  return [(png_uri(a), png_uri(b)) for a, b in pairs]


def prompts(workdir: epath.Path) -> list[dict]:
  """One entry a prompt of samples/results.jsonl: caption, original, neighbors, and rows of cells of samples."""
  results = summary_lib.read_results(workdir)
  raw = workdir / "raw"
  pairs = {}
  if (raw / raw_pairs.INDEX).exists():
    pairs = {pair.key: pair for split in SPLITS for pair in raw_pairs.read_pairs(raw, split)}
  grouped = {}
  for result in results:
    grouped.setdefault((result["key"], result["prompt"]), []).append(result)
  return [
    _prompt(workdir, pairs, key, caption, found)
    for (key, caption), found in list(grouped.items())[:MAX_PROMPTS]
  ]


def _prompt(workdir: epath.Path, pairs: dict, key: str, caption: str, results: list[dict]) -> dict:
  picture = lambda key: file_uri(pairs[key].image) if key in pairs else None
  names = dict.fromkeys(
    name for result in results for name in (n["key"] for n in result["neighbors"])
  )
  rows = []
  for retrieve in sorted({result["retrieve"] for result in results}, reverse=True):
    cells = {}
    for result in (r for r in results if r["retrieve"] == retrieve):
      uri = file_uri(workdir / "samples" / result["file"])
      cells.setdefault(result["guidance"], []).append((uri, result.get("clip_score")))
    rows.append({"retrieve": retrieve, "cells": sorted(cells.items())})
  neighbors = [
    {"caption": pairs[name].caption if name in pairs else name, "picture": picture(name)}
    for name in names
  ]
  return {"caption": caption, "original": picture(key), "neighbors": neighbors, "rows": rows}


def grids(workdir: epath.Path) -> list[tuple[str, str]]:
  """(name, data URI) of the grids drawn during training, in the order of their steps, evenly spaced."""
  folder = workdir / "train" / "samples"
  step = lambda path: int(re.sub(r"\D", "", path.stem) or 0)
  paths = sorted(folder.glob("*.png"), key=step) if folder.exists() else []
  chosen = np.unique(np.linspace(0, len(paths) - 1, min(MAX_GRIDS, len(paths))).astype(int))
  return [(f"step {step(paths[i])}", file_uri(paths[i])) for i in chosen]


def licenses(workdir: epath.Path) -> list[dict]:
  """Who made the pictures: one dict a source and license, with its number of pairs and every attribution."""
  if not (workdir / "raw" / raw_pairs.INDEX).exists():
    return []
  found = {}
  for origin in raw_pairs.read_index(workdir / "raw")["origins"]:
    if origin["kind"] == "pairs":
      place = (origin["source"], origin["license"])
      entry = found.setdefault(
        place, {"source": place[0], "license": place[1], "pairs": 0, "attributions": []}
      )
      entry["pairs"] += origin["records"]
      entry["attributions"].append(origin["attribution"])
  return list(found.values())


def show(value) -> str:
  """A number as a person reads it: 4 significant digits, thousands set apart, a sign of minus that is one."""
  if isinstance(value, bool):
    return "yes" if value else "no"
  if isinstance(value, int):
    return f"{value:,}".replace("-", "−")
  if isinstance(value, float):
    text = (
      f"{value:,.0f}"
      if abs(value) >= 10_000
      else f"{value:.4g}"
      if value == 0 or abs(value) >= 1e-3
      else f"{value:.2e}"
    )
    return text.replace("-", "−")
  return "—" if value is None else str(value)


def clock(seconds: float) -> str:
  """`clock(75.2) == "1 min 15 s"`."""
  return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds) // 60} min {int(seconds) % 60} s"


def page_environment() -> jinja2.Environment:
  """What this package's pages are made with: templates that may include one another, the filter `show`."""
  read = lambda name: importlib.resources.files(__package__).joinpath(name).read_text()
  environment = jinja2.Environment(
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
    loader=jinja2.FunctionLoader(read),
  )
  environment.filters["show"] = show
  return environment


def render(workdir: epath.PathLike, summary: dict, config_name: str) -> str:
  """The page.

  Args:
    workdir: of the run.
    summary: of `summary.collect`.
    config_name: what stood behind --config, for the commands.

  Returns:
    HTML without any reference to another file.
  """
  workdir = epath.Path(workdir)
  metrics = read_json_lines(workdir / "train" / "metrics" / "metrics.jsonl")
  environment = page_environment()
  environment.filters |= {
    "clock": clock,
    "flatten": summary_lib.flatten,
    "groups": describe_groups,
  }
  return environment.get_template("report.html.jinja").render(
    summary=summary,
    stages=stages.STAGES,
    config_name=config_name,
    date=datetime.date.today().isoformat(),
    loss_svg=loss_figure(metrics),
    bits_svg=bits_figure(summary.get("evaluation", {})),
    reconstructions=reconstructions(workdir),
    prompts=prompts(workdir),
    num_prompts=len({(r["key"], r["prompt"]) for r in summary_lib.read_results(workdir)}),
    grids=grids(workdir),
    licenses=licenses(workdir),
  )


def write(workdir: epath.PathLike, config_name: str) -> dict:
  """Writes summary.json and report.html into `workdir` and returns the summary."""
  workdir = epath.Path(workdir)
  summary = summary_lib.collect(workdir)
  write_json(workdir / "summary.json", summary)
  with replacing(workdir / "report.html", "w") as file:
    file.write(render(workdir, summary, config_name))
  return summary

"""Renders report.html: one page about a run, with its images embedded."""

import base64
import datetime
import io
import re
from typing import Any

from etils import epath
import jinja2
import matplotlib
from matplotlib.figure import Figure
import numpy as np
import numpy.typing as npt
from PIL import Image

from cm3leon_jax.data.raw import reader
from cm3leon_jax.data.sources.records import SPLITS, RawPair
from cm3leon_jax.evaluation import judged
from cm3leon_jax.evaluation.intervals import describe_groups, describe_share
from cm3leon_jax.files.atomic import replacing
from cm3leon_jax.files.json_files import read_json_lines, write_json
from cm3leon_jax.generation.sample import describe_found
from cm3leon_jax.reports import summary as summary_lib
from cm3leon_jax.stages import stages
from cm3leon_jax.stages import table as stage_table

MAX_PROMPTS = 16
MAX_RECONSTRUCTIONS = 16
MAX_GRIDS = 8
INK, IMAGE, TEXT = "#80868c", "#3d8fae", "#c8743f"  # Readable on light and on dark pages.
STYLE: dict[Any, Any] = {
  "svg.fonttype": "none",
  "svg.hashsalt": "cm3leon_jax",
  "font.size": 10,
  **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
  "axes.edgecolor": INK,
  "axes.grid": True,
  "grid.alpha": 0.3,
}


def png_uri(pixels: npt.ArrayLike) -> str:
  """Encodes [H, W, 3] or [H, W, 4] uint8 as the data URI of a PNG."""
  buffer = io.BytesIO()
  Image.fromarray(np.asarray(pixels)).save(buffer, "PNG", optimize=True)
  return _data_uri(buffer.getvalue())


def file_uri(path: epath.PathLike) -> str | None:
  """Returns the data URI of a PNG file, or None if the file does not exist."""
  path = epath.Path(path)
  return _data_uri(path.read_bytes()) if path.is_file() else None


def _data_uri(png: bytes) -> str:
  return "data:image/png;base64," + base64.b64encode(png).decode()


def to_svg(figure: Figure) -> str:
  """Renders a figure as inline SVG as wide as the page."""
  buffer = io.StringIO()
  figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
  svg = buffer.getvalue()
  return re.sub(r" (width|height)=\"[^\"]*\"", "", svg[svg.index("<svg") :], count=2)


def smooth(values: np.ndarray, window: int) -> np.ndarray:
  """Averages [n] values over a centered window, which is cut off at both ends of `values`."""
  kernel = np.ones(min(window, len(values)))
  total, count = (np.convolve(x, kernel, "same") for x in (values, np.ones(len(values))))
  return total / count


def loss_figure(metrics: list[dict]) -> str | None:
  """Plots training and held-out loss of image codes and text tokens, in bits per target.

  Returns inline SVG, or None if fewer than two steps are logged.
  """
  steps = [line for line in metrics if "image_loss" in line]
  if len(steps) < 2:
    return None
  heldout = [line for line in metrics if "heldout_image_loss" in line]
  x = np.array([line["step"] for line in steps])
  with matplotlib.rc_context(STYLE):
    figure = Figure(figsize=(9, 3.1), layout="constrained")
    panels = (("image", "Image codes", IMAGE), ("text", "Text tokens", TEXT))
    for axis, (name, title, color) in zip(figure.subplots(1, 2), panels):
      y = np.array([line[f"{name}_loss"] for line in steps]) / np.log(2)
      axis.plot(x, y, color=color, alpha=0.25, linewidth=0.8)
      mean = smooth(y, max(len(x) // 40, 1))
      axis.plot(x, mean, color=color, linewidth=1.6, label="training (smoothed)")
      held = np.array([line[f"heldout_{name}_loss"] for line in heldout]) / np.log(2)
      at = [line["step"] for line in heldout]
      axis.plot(at, held, "o", color=INK, markersize=4, label="held out")
      first = held[:1] if at[:1] == [0] else []  # Held-out loss before tuning, the highest of all.
      top = 1.05 * max(float(np.percentile(y, 99.5)), *first, 0.0)
      axis.set(title=title, xlabel="step", ylabel="bits per target", ylim=(0, top))
      axis.legend(frameon=False, fontsize=9)
    return to_svg(figure)


def reconstructions(workdir: epath.Path) -> list[tuple[str, str]]:
  """Returns the first MAX_RECONSTRUCTIONS images as (original, reconstruction) data URIs."""
  path = workdir / "vqgan" / "reconstructions.npz"
  if not path.exists():
    return []
  with path.open("rb") as f, np.load(f) as arrays:
    pairs = list(zip(arrays["originals"], arrays["reconstructions"]))[:MAX_RECONSTRUCTIONS]
  return [(png_uri(a), png_uri(b)) for a, b in pairs]


def reconstruction_sheet(workdir: epath.Path) -> str | None:
  """Returns a data URI: images of the run, as the image tokenizer of its base reconstructs them."""
  folders = ("documents", "instructions")
  uris = (file_uri(workdir / folder / "reconstructions.png") for folder in folders)
  return next(filter(None, uris), None)


def prompts(workdir: epath.Path) -> list[dict]:
  """Returns the first MAX_PROMPTS prompts, each with caption, true image, neighbors and samples."""
  raw = workdir / "raw"
  pairs: dict[str, RawPair] = {}
  grouped: dict[tuple[str, str], list[dict]] = {}
  if (raw / reader.INDEX).exists():
    pairs = {pair.key: pair for split in SPLITS for pair in reader.read_pairs(raw, split)}
  for result in summary_lib.read_results(workdir):
    grouped.setdefault((result["key"], result["prompt"]), []).append(result)
  return [
    _prompt(workdir, pairs, key, caption, results)
    for (key, caption), results in list(grouped.items())[:MAX_PROMPTS]
  ]


def _prompt(workdir: epath.Path, pairs: dict, key: str, caption: str, results: list[dict]) -> dict:
  keys = dict.fromkeys(neighbor["key"] for r in results for neighbor in r["neighbors"])
  images = {name: file_uri(pairs[name].image) for name in (key, *keys) if name in pairs}
  rows = []
  for retrieve in sorted({result["retrieve"] for result in results}, reverse=True):
    cells: dict[float, list[tuple[str | None, float | None]]] = {}
    of_row = [result for result in results if result["retrieve"] == retrieve]
    for result in of_row:
      uri = file_uri(workdir / "samples" / result["file"])
      cells.setdefault(result["guidance"], []).append((uri, result.get("clip_score")))
    found = describe_found([len(result["neighbors"]) for result in of_row], retrieve)
    rows.append({"found": found, "cells": sorted(cells.items())})
  neighbors = [
    {"caption": pairs[name].caption if name in pairs else name, "image": images.get(name)}
    for name in keys
  ]
  return {"caption": caption, "original": images.get(key), "neighbors": neighbors, "rows": rows}


def grids(workdir: epath.Path) -> list[tuple[str, str | None]]:
  """Returns (name, data URI) of at most MAX_GRIDS sample grids, evenly spaced over the training."""
  folder = workdir / "train" / "samples"
  files = folder.glob("*.png") if folder.exists() else []
  paths = sorted((int(re.sub(r"\D", "", path.stem) or 0), path) for path in files)
  chosen = np.unique(np.linspace(0, len(paths) - 1, min(MAX_GRIDS, len(paths))).astype(int))
  return [(f"step {paths[i][0]}", file_uri(paths[i][1])) for i in chosen]


def licenses(workdir: epath.Path) -> list[dict]:
  """Returns one dict per source and license of images: number of pairs, attributions."""
  if not (workdir / "raw" / reader.INDEX).exists():
    return []
  entries: dict[tuple, dict[str, Any]] = {}
  for origin in reader.read_index(workdir / "raw")["origins"]:
    if origin["kind"] == "pairs":
      names = {"source": origin["source"], "license": origin["license"]}
      new = {**names, "pairs": 0, "attributions": []}
      entry = entries.setdefault(tuple(names.values()), new)
      entry["pairs"] += origin["records"]
      entry["attributions"].append(origin["attribution"])
  return list(entries.values())


def show(value: Any) -> str:
  """Formats a value for a page.

  show(True) = "yes", show(-1234) = "−1,234", show(0.123456) = "0.1235", show(None) = "—"
  """
  if isinstance(value, bool):
    return "yes" if value else "no"
  if isinstance(value, int):
    return f"{value:,}".replace("-", "−")
  if isinstance(value, float):
    is_small = 0 < abs(value) < 1e-3
    form = ",.0f" if abs(value) >= 10_000 else ".2e" if is_small else ".4g"
    return f"{value:{form}}".replace("-", "−")
  return "—" if value is None else str(value)


def clock(seconds: float) -> str:
  """Formats seconds: clock(75.2) = "1 min 15 s"."""
  return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds) // 60} min {int(seconds) % 60} s"


# Characters that control a terminal or the text direction, or that UTF-8 cannot encode.
OBEYED = re.compile(
  r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def inert(value: Any) -> Any:
  """Makes the control characters of a text visible: inert("a\\x1b[2J") = "a⟨U+001B⟩[2J"."""
  if not isinstance(value, str) or hasattr(value, "__html__"):
    return value
  return OBEYED.sub(lambda match: f"⟨U+{ord(match.group()):04X}⟩", value)


def page_environment() -> jinja2.Environment:
  """Returns the Jinja environment for the templates of this package, with the filter `show`.

  Pages show untrusted texts, so HTML is escaped and control characters are made visible (`inert`).
  """
  environment = jinja2.Environment(
    autoescape=True,
    finalize=inert,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
    loader=jinja2.PackageLoader(__package__, ""),
  )
  environment.filters["show"] = show
  return environment


def render(workdir: epath.PathLike, summary: dict, config_name: str) -> str:
  """Renders the page as self-contained HTML, with the --config of its commands, or ""."""
  workdir = epath.Path(workdir)
  metrics = read_json_lines(workdir / "train" / "metrics" / "metrics.jsonl", {"step": int})
  environment = page_environment()
  environment.filters |= {"clock": clock, "groups": describe_groups, "share": describe_share}
  return environment.get_template("report.html.jinja").render(
    summary=summary,
    cost=summary_lib.cost(summary),
    stages=stage_table.STAGES,
    shown=summary_lib.expected_stages(workdir),
    is_tuned=stages.command_of(workdir / "text_tokenizer") == "copy_tokenizers",
    commands={folder: stages.command_of(workdir / folder) for folder in stage_table.STAGES},
    name=config_name or workdir.absolute().name,
    config_name=config_name or "CONFIG",
    date=datetime.date.today().isoformat(),
    loss_svg=loss_figure(metrics),
    judged_sheet=file_uri(workdir / "evaluation" / judged.SHEET),
    reconstructions=reconstructions(workdir),
    reconstruction_sheet=reconstruction_sheet(workdir),
    prompts=prompts(workdir),
    num_prompts=len({(r["key"], r["prompt"]) for r in summary_lib.read_results(workdir)}),
    grids=grids(workdir),
    licenses=licenses(workdir),
  )


def write(workdir: epath.PathLike, config_name: str) -> dict:
  """Writes summary.json and report.html to `workdir`, and returns the summary."""
  workdir = epath.Path(workdir)
  summary = summary_lib.collect(workdir)
  write_json(workdir / "summary.json", summary)
  with replacing(workdir / "report.html", "w") as file:
    file.write(render(workdir, summary, config_name))
  return summary

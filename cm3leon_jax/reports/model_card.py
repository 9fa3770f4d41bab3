"""Writes the model card of an export: README.md, whose code snippets run in the export's folder."""

import re

from etils import epath
import jinja2

from cm3leon_jax.data.documents import training_data
from cm3leon_jax.files.atomic import replacing
from cm3leon_jax.files.json_files import read_json
from cm3leon_jax.generation.text_tasks import QUESTION
from cm3leon_jax.reports import card_figures
from cm3leon_jax.reports import summary as summary_lib
from cm3leon_jax.reports.report import clock, inert
from cm3leon_jax.run.run import Run
from cm3leon_jax.run.source import settings_of_run
from cm3leon_jax.version import VERSION


def write(folder: epath.PathLike, run: Run, step: int, exported: dict) -> None:
  """Writes the card of an export whose other files are written. Raises UserError if one is damaged.

  `exported` has numbers of the export: "parameters", "image_tokenizer", and "architecture" (hf),
  "published" (True for a `published_layout`), "average" (False for the last parameters),
  "heldout_bits" (bits per token "before" and "after" rounding) and "cost" (of a bundle).
  """
  summary, learned = summary_lib.collect(run.folder), training_data.read(folder)
  trained = run.settings if "cost" in exported else settings_of_run(run.folder)
  loader, undefined = jinja2.PackageLoader(__package__, ""), jinja2.StrictUndefined
  environment = jinja2.Environment(loader=loader, undefined=undefined)
  environment.trim_blocks = environment.lstrip_blocks = True
  environment.filters |= {"cell": cell, "clock": clock, "count": lambda x: f"{x:,}"}
  text = environment.get_template("model_card.md.jinja").render(
    version=VERSION,
    exported=exported,
    about=read_json(epath.Path(folder) / "export.json"),
    settings=run.settings,
    trained=trained,
    question=QUESTION.format("...").replace("<mask>", "`<mask:0>`"),
    tasks=sorted(name[6:] for name in summary.get("instructions", {}) if name[:6] == "train_"),
    learned=learned,
    licenses=sorted({origin["license"] for origin in learned["origins"]} - {""}),
    unlicensed=sorted({x["source"] or x["run"] for x in learned["origins"] if not x["license"]}),
    unknown=not all(one["known"] for one in learned["runs"]),
    cost=exported.get("cost", summary_lib.cost(summary)),
    step=step,
    figures=card_figures.collect(Run(run.folder, trained), step, summary),
  )
  with replacing(epath.Path(folder) / "README.md", "w") as file:
    file.write(text)


def cell(text: str) -> str:
  """Formats an untrusted text as code if it has special characters: `[a](b)` -> "`[a](b)`"."""
  text = " ".join(inert(str(text)).split())
  is_plain = re.fullmatch(r"[\w\s.,:;/()+%-]*( \[[\d.,e+ -]+\])?", text)
  return text if is_plain else f"`{text.replace('`', chr(39)).replace('|', chr(92) + '|')}`"

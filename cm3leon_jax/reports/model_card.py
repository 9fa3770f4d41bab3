"""Writes the model card of an export: README.md in the format of the Hugging Face Hub.

The card shows the figures that the workdir has, and how each was measured. Its code snippets run in
the folder of the export.
"""

import json
import re

from etils import epath
import jinja2
import yaml

import cm3leon_jax
from cm3leon_jax.data.documents import training_data
from cm3leon_jax.files.atomic import replacing
from cm3leon_jax.files.json_files import read_json
from cm3leon_jax.generation.text_tasks import QUESTION
from cm3leon_jax.reports import card_figures
from cm3leon_jax.reports import summary as summary_lib
from cm3leon_jax.reports.report import clock, inert
from cm3leon_jax.run.folders import settings_of_run
from cm3leon_jax.run.run import Run

CARD = "README.md"
EXPORTED = "export.json"  # `export.formats` writes it: format, dtype, quantization.
TEMPLATE = "model_card.md.jinja"
MOST_ORIGINS = 20


def write(folder: epath.PathLike, run: Run, step: int, exported: dict) -> None:
  """Writes README.md into the folder of an export. All other files must already be written.

  Args:
    exported: numbers of the export. "parameters": number of parameters of the decoder. Optional:
      "image_tokenizer": result of `export.image_tokenizer.write`; "average": False if the last
      parameters were exported instead of their average; "heldout_bits": {"before", "after"}, the
      held-out loss in bits per token before and after the parameters were rounded; "cost": for a
      bundle, see `export.bundle.about`.

  Raises:
    UserError: a file of the workdir is absent or damaged.
  """
  with replacing(epath.Path(folder) / CARD, "w") as file:
    file.write(render(epath.Path(folder), run, step, exported))


def render(folder: epath.Path, run: Run, step: int, exported: dict) -> str:
  """Returns the text of the card, see `write`."""
  summary, settings = summary_lib.collect(run.folder), run.settings
  described, about = (
    read_json(path) if path.exists() else {} for path in (folder / "config.json", folder / EXPORTED)
  )
  architecture = (described.get("architectures") or [""])[0]
  trained = settings_of_run(run.folder) if "cost" not in exported else settings
  images = exported.get("image_tokenizer", {})
  learned = training_data.read(folder)
  data = learned["origins"]
  licenses = {origin["license"] for origin in data}
  if not all(one["known"] for one in learned["runs"]):
    licenses.add("")
  tuned = [name for name in summary.get("instructions", {}) if name.startswith("train_")]
  fields = {
    "front_matter": front_matter(architecture),
    "version": cm3leon_jax.__version__,
    "exported": exported,
    "architecture": architecture,
    "about": {"dtype": "float32", "format": "", "quantize": "", **about},
    "has_script": (folder / "image_tokenizer" / "decode_image.py").exists(),
    "model": settings.model,
    "vocab": settings.vocab,
    "side": images.get("resolution", trained.vqgan.resolution),
    "codes": images.get("image_tokens", trained.vqgan.image_tokens),
    "family": images.get("family", ""),
    "sampling": trained.sampling,
    "train": trained.train,
    "sequence_length": trained.data.sequence_length,
    "caption": "a photo of a dog",
    "question": QUESTION.replace("{}", "..."),
    "tasks": sorted(name.removeprefix("train_") for name in tuned),
    "data": data[:MOST_ORIGINS],
    "more_data": len(data) - len(data[:MOST_ORIGINS]),
    "bases": learned["runs"][1:],
    "licenses": sorted(licenses),
    "cost": exported.get("cost", summary_lib.cost(summary)),
    "step": step,
    "figures": card_figures.collect(Run(run.folder, trained), step, summary),
  }
  return _environment().get_template(TEMPLATE).render(fields)


def front_matter(architecture: str) -> str:
  """Returns the metadata for the hub as YAML. The publisher of a model chooses its license.

  `architecture` is the class of `transformers` that can load the decoder; "" if no class can.
  """
  fields: dict = {"license": "other", "license_name": "see-license-below", "license_link": CARD}
  if architecture:
    fields |= {"library_name": "transformers", "pipeline_tag": "text-generation"}
  fields["tags"] = ["cm3leon", "multimodal", "text-to-image", "image-to-text", "retrieval"]
  return yaml.safe_dump(fields, sort_keys=False).rstrip()


def cell(text: str) -> str:
  """Makes an untrusted text safe in Markdown: formats it as code if it has special characters.

  cell("Jane, 2020") = "Jane, 2020", cell("1.5 [1, 2]") = "1.5 [1, 2]",
  cell("[a](b)|<c>") = "`[a](b)\\|<c>`"
  """
  text = " ".join(inert(str(text)).split())
  if re.fullmatch(r"[\w\s.,:;/()+%-]*( \[[\d.,e+ -]+\])?", text):
    return text
  return f"`{text.replace('`', chr(39)).replace('|', chr(92) + '|')}`"


def _environment() -> jinja2.Environment:
  environment = jinja2.Environment(
    loader=jinja2.PackageLoader(__package__, ""),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    autoescape=False,
  )
  environment.filters |= {"cell": cell, "clock": clock, "quoted": json.dumps}
  environment.filters["count"] = lambda x: f"{x:,}"
  return environment

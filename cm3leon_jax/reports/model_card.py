"""Writes the model card of an export: README.md in the format of the Hugging Face Hub.

The card shows the figures that the workdir has, states how each was measured, and names missing
measurements. Its code snippets run in the folder of the export.
"""

import json
import math
import re
import textwrap

from etils import epath
import jinja2
import yaml

import cm3leon_jax
from cm3leon_jax import settings as settings_lib
from cm3leon_jax.data.documents import training_data
from cm3leon_jax.data.sources.records import KINDS, SPLITS
from cm3leon_jax.evaluation.world import of_source
from cm3leon_jax.files.atomic import replacing
from cm3leon_jax.files.json_files import read_json
from cm3leon_jax.generation.text_tasks import QUESTION
from cm3leon_jax.reports import card_figures
from cm3leon_jax.reports import summary as summary_lib
from cm3leon_jax.reports.report import clock, inert
from cm3leon_jax.trained.run import Run

CARD = "README.md"
EXPORTED = "export.json"  # `export.formats` writes it: format, dtype, quantization.
TEMPLATE = "model_card.md.jinja"
MOST_ORIGINS = 20
COLUMNS = 100  # Width of a line of prose.
# Licenses that the hub knows. The hub writes their SPDX names in lower case.
HUB_LICENSES = (
  *("apache-2.0", "bsd-2-clause", "bsd-3-clause", "mit", "gpl-3.0", "unlicense", "cc0-1.0"),
  *("cc-by-2.0", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nd-4.0"),
  *("cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0"),
  *("odc-by", "odbl"),
)
_BLOCKS = re.MULTILINE | re.DOTALL


def write(folder: epath.PathLike, run: Run, step: int, exported: dict) -> None:
  """Writes README.md into the folder of an export. All other files must already be written.

  Args:
    exported: numbers of the export. "parameters": number of parameters of the decoder. Optional:
      "bytes": size of the files; "image_tokenizer": result of `export.image_tokenizer.write`;
      "average": False if the last parameters were exported instead of their average;
      "heldout_bits": {"before", "after"}, the held-out loss in bits per token before and after the
      parameters were rounded; "cost": for a bundle, see `export.bundle.about`.

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
  form, quantized = about.get("format", ""), bool(about.get("quantize"))
  architecture = (described.get("architectures") or [""])[0]
  trained = settings_lib.settings_of_run(run.folder) if "cost" not in exported else settings
  world = of_source(trained)
  sizes = {"resolution": trained.vqgan.resolution, "image_tokens": trained.vqgan.image_tokens}
  sizes |= {"family": "", "code_dim": trained.vqgan.code_dim} | exported.get("image_tokenizer", {})
  learned = training_data.read(folder)
  data, bases = learned["origins"], learned["runs"][1:]
  licenses = {origin["license"] for origin in data}
  if not all(one["known"] for one in learned["runs"]):
    licenses.add("")
  fields = {
    "front_matter": front_matter(sorted(licenses), architecture),
    "version": cm3leon_jax.__version__,
    "exported": exported,
    "architecture": architecture,
    "dtype": about.get("dtype", "float32"),
    "format": form,
    "quantized": quantized,
    "starts_runs": form in ("hf", "orbax") and not quantized,
    "position_ids": described.get("cm3leon", {}).get("position_ids"),
    "has_script": (folder / "image_tokenizer" / "decode_image.py").exists(),
    "model": settings.model,
    "vocab": settings.vocab,
    "side": sizes["resolution"],
    "codes": sizes["image_tokens"],
    "grid": math.isqrt(sizes["image_tokens"]),
    "family": sizes["family"],
    "code_dim": sizes["code_dim"],
    "trained": trained,
    "caption": world.caption if world else "a photo of a dog",
    "question": QUESTION.replace("{}", "..."),
    "changed": [line for line in settings_lib.describe(trained) if "# default:" in line],
    "tasks": sorted(tuned_tasks(summary)),
    "data": data[:MOST_ORIGINS],
    "more_data": len(data) - len(data[:MOST_ORIGINS]),
    "bases": bases,
    "licenses": sorted(licenses),
    "cost": exported.get("cost", summary_lib.cost(summary)),
    "step": step,
    "records": records_of_splits(summary.get("raw", {})),
    "figures": card_figures.collect(Run(run.folder, trained), step, summary),
  }
  return wrapped(_environment().get_template(TEMPLATE).render(fields))


def front_matter(licenses: list[str], architecture: str) -> str:
  """Returns the metadata for the hub as YAML.

  The license is the license of the training data if there is only one and the hub knows it, else
  "other". `licenses` are the licenses of all training data; "" is an unknown license.
  `architecture` is the class of `transformers` that can load the decoder; "" if no class can.
  """
  only = licenses[0].lower() if len(licenses) == 1 else ""
  fields: dict = {"license": only}
  if only not in HUB_LICENSES:
    fields = {"license": "other", "license_name": "see-license-below", "license_link": CARD}
  tags = ["cm3leon", "cm3leon_jax", "multimodal", "text-to-image", "image-to-text", "retrieval"]
  if architecture:
    fields |= {"library_name": "transformers", "pipeline_tag": "text-generation"}
  fields["tags"] = tags
  return yaml.safe_dump(fields, sort_keys=False).rstrip()


def records_of_splits(raw: dict) -> dict[str, int]:
  """Counts the records of a stage `raw` by kind; {} if its summary has no counts.

  "images" counts the captioned images of the training split, and "texts" its other records.

  records_of_splits({"train_pairs": 8, "train_texts": 2, "heldout_pairs": 1, "bank_pairs": 3})
  {"images": 8, "texts": 2, "heldout": 1, "bank": 3}
  """
  if "train_pairs" not in raw:
    return {}
  found = {split: [raw.get(f"{split}_{kind}", 0) for kind in KINDS] for split in SPLITS}
  images, *others = found["train"]
  return {
    "images": images,
    "texts": sum(others),
    "heldout": sum(found["heldout"]),
    "bank": sum(found["bank"]),
  }


def tuned_tasks(summary: dict) -> list[str]:
  """Returns the names of the tasks of instruction tuning; [] without instruction tuning."""
  names = summary.get("instructions", {})
  return [name.removeprefix("train_") for name in names if name.startswith("train_")]


def cell(text: str) -> str:
  """Makes an untrusted text safe in Markdown: formats it as code if it has special characters.

  cell("Jane, 2020") = "Jane, 2020", cell("1.5 [1, 2]") = "1.5 [1, 2]",
  cell("[a](b)|<c>") = "`[a](b)\\|<c>`"
  """
  text = " ".join(inert(str(text)).split())
  if re.fullmatch(r"[\w\s.,:;/()+%-]*( \[[\d.,e+ -]+\])?", text):
    return text
  return f"`{text.replace('`', chr(39)).replace('|', chr(92) + '|')}`"


def wrapped(page: str) -> str:
  """Wraps paragraphs and lists of a Markdown page, but not code blocks, tables, titles and HTML.

  A paragraph is not wrapped if one of its new lines would start like a list, a title or a quote.
  """
  parts = re.split(r"(^---\n.*?^---$|^```.*?^```$|^[|#<].*?$|^$)", page, flags=_BLOCKS)
  return "".join(part if i % 2 else _wrapped(part) for i, part in enumerate(parts))


def _wrapped(prose: str) -> str:
  """Wraps the lines of a paragraph or of a list."""
  if not prose.strip():
    return prose
  start = prose[: len(prose) - len(prose.lstrip("\n"))]
  end = prose[len(prose.rstrip("\n")) :]
  lines = []
  for item in re.split(r"\n(?=- )", prose.strip("\n")):
    text, indent = " ".join(item.split()), "  " if item.startswith("- ") else ""
    whole = re.sub(r"`[^`]*`", lambda code: code[0].replace(" ", "\0"), text)  # Never split code.
    found = textwrap.wrap(
      whole, COLUMNS, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    found = [line.replace("\0", " ") for line in found]
    marked = any(re.match(r"\s*(>|([-+*#=]+|\d+[.)])(\s|$))", line) for line in found[1:])
    lines += [text] if marked else found
  return start + "\n".join(lines) + end


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

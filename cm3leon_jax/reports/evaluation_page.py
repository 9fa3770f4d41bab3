"""Writes the page of an evaluation: numbers and random examples."""

from collections.abc import Sequence

import numpy as np

from cm3leon_jax.data.raw import reader
from cm3leon_jax.evaluation.protocols import samples
from cm3leon_jax.evaluation.protocols.metrics import METRICS
from cm3leon_jax.evaluation.protocols.run import ProtocolRun
from cm3leon_jax.files.atomic import replacing
from cm3leon_jax.reports.report import page_environment, png_uri

PAGE = "report.html"
NUM_EXAMPLES = 12


def write(job: ProtocolRun, result: dict) -> None:
  """Writes report.html."""
  count = len(job.evaluated.examples)
  rng = np.random.default_rng(job.protocol.seed)
  chosen = rng.permutation(count)[:NUM_EXAMPLES].tolist()
  sections = [{"title": "Examples, chosen by the seed", "rows": _rows(job, chosen)}]
  template = page_environment().get_template("evaluation.html.jinja")
  metrics = {name: METRICS[name].title for name in result["metrics"]}
  page = template.render(
    result=result, metrics=metrics, sections=sections, page_title=result["name"]
  )
  with replacing(job.folder / PAGE, "w") as file:
    file.write(page)


def _rows(job: ProtocolRun, places: Sequence[int]) -> list[dict]:
  """Returns one row of the page per example: prompt, expected answer, and a sample per column."""
  cells: dict[int, dict] = {i: {} for i in places}
  for column in job.protocol.columns:
    starts = sorted({i - i % samples.PART for i in cells})
    parts = [samples.read_part(job.samples, column.name, start) for start in starts]
    lines = [line for part in parts for line in part if line["row"] in cells]
    for line, cell in zip(lines, _cells(job, lines)):
      cells[line["row"]][column.name] = cell
  size = job.pipeline.layout.resolution
  rows = []
  for i in places:
    example = job.evaluated.examples[i]
    real = None if example.image is None else png_uri(reader.load_image(example.image, size))
    shown = {"key": example.key, "prompt": job.protocol.text_of(example), "real": real}
    rows.append({**shown, "references": example.references[:3], "cells": cells[i]})
  return rows


def _cells(job: ProtocolRun, lines: list[dict]) -> list[dict]:
  if job.protocol.task == "text":
    return [{"text": line["text"], "image": None, "score": None} for line in lines]
  images = job.pipeline.image_tokenizer.decode(np.array([line["codes"] for line in lines]))
  return [
    {"text": "", "image": png_uri(image), "score": line["clip_score"]}
    for image, line in zip(images, lines)
  ]

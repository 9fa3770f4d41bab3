"""Writes the page of an evaluation: numbers and random examples."""

from collections.abc import Sequence

import numpy as np

from cm3leon_jax.data.raw import reader
from cm3leon_jax.evaluation.protocols import samples
from cm3leon_jax.evaluation.protocols.inputs import Job
from cm3leon_jax.evaluation.protocols.metrics import METRICS
from cm3leon_jax.files.atomic import replacing
from cm3leon_jax.reports.report import page_environment, png_uri

PAGE = "report.html"
NUM_EXAMPLES = 12


def write(job: Job, result: dict) -> None:
  """Writes report.html."""
  rng = np.random.default_rng(job.protocol.seed)
  chosen = rng.permutation(len(job.groups))[:NUM_EXAMPLES].tolist()
  template = page_environment().get_template("evaluation.html.jinja")
  metrics = {name: METRICS[name].title for name in result["metrics"]}
  page = template.render(
    result=result, metrics=metrics, rows=_rows(job, chosen), page_title=result["name"]
  )
  with replacing(job.folder / PAGE, "w") as file:
    file.write(page)


def _rows(job: Job, places: Sequence[int]) -> list[dict]:
  """Returns one row of the page per example: prompt, expected answer, and a sample per column."""
  size = job.pipeline.layout.resolution
  rows: dict[int, dict] = {}
  for i in places:
    example = job.evaluated.examples[i]
    real = None if example.image is None else png_uri(reader.load_image(example.image, size))
    shown = {"key": example.key, "prompt": job.protocol.text_of(example), "real": real}
    rows[i] = {**shown, "references": example.references[:3], "cells": {}}
  for column in job.protocol.columns:
    for start in sorted({i - i % samples.PART for i in places}):
      for line in samples.read_part(job.samples, column.name, start):
        if line["row"] in rows:
          image = png_uri(job.decode([line])[0]) if "codes" in line else None
          cell = {"text": line.get("text", ""), "image": image, "score": line["clip_score"]}
          rows[line["row"]]["cells"][column.name] = cell
  return list(rows.values())

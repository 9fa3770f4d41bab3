"""Writes the results of a protocol as JSON, and formats them as text."""

import dataclasses

import jax

from cm3leon_jax import distributed
from cm3leon_jax.evaluation.protocols import protocol as protocol_lib
from cm3leon_jax.evaluation.protocols.metrics import METRICS
from cm3leon_jax.evaluation.protocols.run import ProtocolRun
from cm3leon_jax.evaluation.protocols.samples import Evaluated
from cm3leon_jax.files.digests import digest
from cm3leon_jax.files.json_files import plain, write_json
from cm3leon_jax.version import VERSION

RESULTS = "results.json"


def fingerprint(evaluated: Evaluated) -> str:
  """Returns the SHA-256 of the evaluated data: the examples, and the bytes of their images."""
  images = {path: digest(path) for path in sorted(evaluated.images)}
  return protocol_lib.digest(
    [
      {**dataclasses.asdict(e), "image": images.get(e.image) if e.image else None}
      for e in evaluated.examples
    ]
  )


def write(job: ProtocolRun, about: dict, measured: dict) -> dict:
  """Writes results.json with the figures and data, and returns its content."""
  result = {
    **about,
    "title": job.protocol.title,
    "protocol": dataclasses.asdict(job.protocol),
    "metrics": list(job.metrics),
    "examples": len(job.evaluated.examples),
    "seed": job.protocol.seed,
    "data": fingerprint(job.evaluated),
    "extractor": job.extractor and {"name": job.extractor.name, **job.extractor.identity},
    "scorer": job.scorer_identity,
    "version": VERSION,
    "jax": jax.__version__,
    "device": jax.devices()[0].device_kind,
    **measured,
  }
  if distributed.is_first():
    write_json(job.folder / RESULTS, result)
  return plain(result)


def describe(result: dict) -> str:
  """Formats results as text, with a line for each column, each control and each published model."""
  lines = [f"{result['title']}: {result['examples']} examples"]
  for name, column in result["columns"].items():
    apart = column["divergence"]
    canary = "" if apart is None else f"; KL of the prompt {apart:.3g} nats a code"
    lines.append(f"  {name}: {_numbers(column['metrics'])}{canary}")
  for name, measured in result["controls"].items():
    lines.append(f"  control, {name}: {_numbers(measured)}")
  for row in result["protocol"]["published"]:
    figures = [f"{METRICS[n].title} {row[n]:g}" for n in result["metrics"] if n in row]
    if figures:
      of = f", {row['column']}" if "column" in row else ""
      lines.append(f"  {row['model']}{of} ({row['source']}): {', '.join(figures)}")
  return "\n".join(lines)


def number(value: float) -> str:
  """Formats a number with four significant digits, and values below 1e-9 as 0."""
  return "0" if abs(value) < 1e-9 else f"{value:.4g}"


def with_interval(value: float, found: dict) -> str:
  """Formats a number with its 95% interval, if it has one: "1.02 [0.97, 1.08]"."""
  text = number(value)
  if found.get("low") is None:
    return text
  return f"{text} [{number(found['low'])}, {number(found['high'])}]"


def _numbers(measured: dict[str, dict]) -> str:
  cells = []
  for name, found in measured.items():
    value = "none" if found["value"] is None else with_interval(found["value"], found)
    cells.append(f"{METRICS[name].title} {value}")
    if "recall" in found:
      cells.append(f"recall {found['recall']:.4g}")
  return ", ".join(cells)

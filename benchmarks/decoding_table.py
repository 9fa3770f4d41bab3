"""Compares samplers and guidance weights on a trained run.

  python -m benchmarks.decoding_table --config=ml_configs/scenes.py --workdir=workdir/scenes

Evaluates the columns of a protocol, and its column "top-p, top-k and guidance" at each of
--guidance_weights. The default of --protocol is scenes_decoding. The protocol tutorial_decoding
evaluates the columns of the tutorial (the one this project started from) on MS-COCO. Writes
table.md and plot.png next to results.json and report.html. Skips finished parts.
"""

import dataclasses
import os

from absl import flags
from matplotlib.figure import Figure

from cm3leon_jax.commands import common, evaluate_protocol, protocol_flags
from cm3leon_jax.config import UserError
from cm3leon_jax.evaluation.protocols import protocol as protocol_lib
from cm3leon_jax.evaluation.protocols.metrics import METRICS
from cm3leon_jax.evaluation.protocols.protocol import Protocol
from cm3leon_jax.trained.run import Run

_GUIDANCE = flags.DEFINE_list(
  "guidance_weights", ["1", "1.25", "1.5", "2", "3"], "Guidance weights to compare."
)
DEFAULT = "scenes_decoding"
BASE = "top-p, top-k and guidance"  # Column that is evaluated at each guidance weight.


def with_guidance(protocol: Protocol, weights: list[float]) -> Protocol:
  """Returns a protocol with an additional column for each guidance weight.

  Raises:
    UserError: the protocol has no column `BASE`.
  """
  base = next((column for column in protocol.columns if column.name == BASE), None)
  if base is None:
    raise UserError(f"--protocol has no column '{BASE}', which --guidance_weights needs.")
  more = [
    dataclasses.replace(base, name=title(weight), sampling={**base.sampling, "guidance": weight})
    for weight in weights
  ]
  return dataclasses.replace(protocol, columns=(*protocol.columns, *more))


def title(weight: float) -> str:
  """Returns the column name of a guidance weight, such as "guidance 1.25"."""
  return f"guidance {weight:g}"


def markdown(result: dict) -> str:
  """Returns a Markdown table with a row per column of the protocol, and published distances."""
  names = result["metrics"]
  published = {row["column"]: row for row in result["protocol"]["published"]}
  sources = sorted({f"{row['model']}, {row['source']}" for row in published.values()})
  head = ["sampler", *(METRICS[n].title for n in names)]
  head += [f"published: {'; '.join(sources)}"] if published else []
  lines = [_row(head), _row(["---"] * len(head))]
  for name, column in result["columns"].items():
    cells = [name, *(_cell(column["metrics"][n]) for n in names)]
    if published:
      row = published.get(name, {})
      cells.append(", ".join(f"{row[n]:g}" for n in names if n in row) or "-")
    lines.append(_row(cells))
  for name, measured in result["controls"].items():
    cells = [_cell(measured[n]) if n in measured else "-" for n in names]
    lines.append(_row([f"control: {name}", *cells, *(["-"] if published else [])]))
  return "\n".join(lines) + "\n"


def _row(cells) -> str:
  return f"| {' | '.join(cells)} |"


def _cell(found: dict) -> str:
  if found["value"] is None:
    return "-"
  text = f"{found['value']:.4g}"
  if found.get("low") is None:
    return text
  return f"{text} [{found['low']:.4g}, {found['high']:.4g}]"


def plot(result: dict, weights: list[float], path: str | os.PathLike) -> None:
  """Plots every metric against the guidance weight, with confidence intervals."""
  names = result["metrics"]
  figure = Figure(figsize=(3.6 * len(names), 3.0), layout="constrained")
  for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names):
    found = [result["columns"][title(weight)]["metrics"][name] for weight in weights]
    axis.plot(weights, [row["value"] for row in found], "o-", color="tab:blue")
    if all(row.get("low") is not None for row in found):
      low, high = ([row[end] for row in found] for end in ("low", "high"))
      axis.fill_between(weights, low, high, alpha=0.2, color="tab:blue", linewidth=0)
    axis.set(xlabel="guidance", title=METRICS[name].title)
    axis.grid(linewidth=0.4, alpha=0.5)
    axis.spines[["top", "right"]].set_visible(False)
  figure.savefig(path, dpi=150)


def main(settings, workdir) -> None:
  try:
    weights = [float(weight) for weight in _GUIDANCE.value]
  except ValueError as error:
    raise UserError(
      f"--guidance_weights is '{','.join(_GUIDANCE.value)}'; give numbers: 1,2,3."
    ) from error
  if not weights or min(weights) < 0 or len(set(weights)) < len(weights):
    raise UserError("--guidance_weights must be different numbers of at least 0: 1,2,3.")
  file = protocol_flags.PROTOCOL.value or DEFAULT
  protocol, *others = protocol_lib.load(file)
  if others:
    raise UserError(f"--protocol={file} has several protocols: name one, {file}/{protocol.name}.")
  name = os.path.splitext(os.path.basename(file))[0]
  options = evaluate_protocol.Options(
    examples=protocol_flags.EXAMPLES.value,
    data=protocol_flags.DATA.value,
    weights=protocol_flags.EXTRACTOR.value,
    clip=protocol_flags.CLIP.value,
  )
  folder, result = evaluate_protocol.run(
    Run.open(workdir, settings), name, with_guidance(protocol, weights), options
  )
  (folder / "table.md").write_text(markdown(result))
  plot(result, weights, folder / "plot.png")
  print(f"{markdown(result)}\ndecoding_table: table.md and plot.png are in {folder}.")


if __name__ == "__main__":
  common.run(main)

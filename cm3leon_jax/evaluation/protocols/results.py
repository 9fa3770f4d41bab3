"""Formats the results of protocols as text."""

from cm3leon_jax.evaluation.protocols.metrics import METRICS

RESULTS = "results.json"


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
  for name, result in measured.items():
    value = "none" if result["value"] is None else with_interval(result["value"], result)
    cells.append(f"{METRICS[name].title} {value}")
    if "recall" in result:
      cells.append(f"recall {result['recall']:.4g}")
  return ", ".join(cells)

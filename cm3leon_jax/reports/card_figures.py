"""Collects the measured figures of a trained model, and how each figure was measured."""

import dataclasses

from etils import epath

from cm3leon_jax.evaluation.intervals import describe_share
from cm3leon_jax.evaluation.protocols.metrics import METRICS
from cm3leon_jax.evaluation.protocols.results import RESULTS, number, with_interval
from cm3leon_jax.files.json_files import read_json
from cm3leon_jax.reports import summary as summary_lib
from cm3leon_jax.run.run import Run
from cm3leon_jax.stages import stages

EVALUATIONS = "evaluations"
LOSSES = {
  "heldout_loss": "Held-out loss (nats per target)",
  "heldout_image_loss": "Held-out loss, image codes (nats per code)",
  "heldout_text_loss": "Held-out loss, text (nats per token)",
}
TITLES = {"vqgan": "Image tokenizer", "train": "Held-out loss", "evaluation": "Held-out documents"}


@dataclasses.dataclass(frozen=True)
class Table:
  """Table of figures that were measured in the same way.

  `how` says how the figures were measured: command, data, number of examples, settings.
  """

  title: str
  how: str
  columns: tuple[str, ...]
  rows: tuple[tuple[str, ...], ...]


def collect(run: Run, step: int, summary: dict) -> list[Table]:
  """Collects the figures in a workdir that were measured with the parameters of a step.

  Raises:
    UserError: a file is damaged.
  """
  tables = [
    _stage_table(run, name, summary)
    for name in TITLES
    if name != "evaluation" or _is_of(run.folder, name, step)
  ]
  return [table for table in tables if table] + _protocols(run.folder, step)


def _is_of(workdir: epath.Path, name: str, step: int) -> bool:
  """Returns whether a stage measured the parameters that the current training has at `step`."""
  path = workdir / name / stages.DONE
  if not path.exists():
    return False
  done = read_json(path, {"config": dict, "summary": dict})
  read = done["config"].get("inputs", {}).get("train")
  return read == stages.train_id(workdir) and done["summary"].get("step", step) == step


def _stage_table(run: Run, name: str, summary: dict) -> Table | None:
  """Returns the table of a stage, or None if it has no figures."""
  paths = {line.title: line.path for line in summary_lib.headlines(summary)}
  rows = []
  for line in summary["headlines"]:
    if paths[line["title"]].partition(".")[0] != name or line["value"] is None:
      continue
    row = (line["title"], with_interval(line["value"], line["interval"] or {}))
    if row not in rows:  # A figure with several targets has several lines.
      rows.append(row)
  if name == "evaluation" and (judged := summary[name].get("judged")):
    share = judged["tables"][judged["best"]]["all"]["correct"]
    rows.append(("Images that show exactly what their captions say", describe_share(share)))
  if name == "train":
    of = summary.get("train", {})
    rows += [(title, number(of[key])) for key, title in LOSSES.items() if key in of]
  if not rows:
    return None
  how = _how(run, name, summary)
  return Table(TITLES[name], how, ("measure", "value"), tuple(rows))


def _how(run: Run, name: str, summary: dict) -> str:
  """Describes how a stage measured its figures."""
  if name == "vqgan":
    return "`cm3leon train_vqgan`: images of held-out pairs are encoded and decoded."
  if name == "train":
    batches = run.settings.train.eval_batches
    return f"`cm3leon train`, at the last step: {batches} batches of held-out documents."
  config = read_json(run.folder / name / stages.DONE, {"config": dict})["config"]
  result, fields = summary[name], config.get("evaluation", {})
  texts = [
    f"`cm3leon evaluate`, seed {config.get('seed')}: bits of {result.get('documents')} held-out "
    "pairs after the neighbors that their captions retrieve."
  ]
  if "judged" in result:
    texts.append(
      f"Images for {fields.get('captions')} held-out captions are judged by their facts; "
      f"neighbors: {fields.get('neighbors')}; {result['judged']['best']}, the best of several."
    )
  return " ".join(texts)


def _protocols(workdir: epath.Path, step: int) -> list[Table]:
  """Returns one table for each protocol that was evaluated with these parameters."""
  fields = {"name": str, "inputs": dict, "step": int, "columns": dict, "metrics": list}
  fields |= {"title": str, "examples": int, "seed": int, "version": str, "device": str}
  tables = []
  for path in sorted((workdir / EVALUATIONS).glob(f"*/{RESULTS}")):
    result = read_json(path, fields)
    same = result["inputs"].get("train") == stages.train_id(workdir)
    if not same or result["step"] != step or "parameters" in result:
      continue
    metrics = result["metrics"]
    titles = [METRICS[name].title if name in METRICS else name for name in metrics]
    rows = []
    for name, column in result["columns"].items():
      cells = [column["metrics"].get(metric) for metric in metrics]
      shown = [
        "-" if x is None or x["value"] is None else with_interval(x["value"], x) for x in cells
      ]
      rows.append((name, *shown))
    how = _how_by_protocol(result)
    tables.append(Table(result["title"], how, ("column", *titles), tuple(rows)))
  return tables


def _how_by_protocol(result: dict) -> str:
  """Names the protocol, number of examples, scoring models and code version of a result."""
  parts = [f"Protocol `{result['name']}`, {result['examples']:,} examples, seed {result['seed']}"]
  if result.get("extractor"):
    parts.append(f"features by {result['extractor']['name']}")
  if result.get("scorer"):
    parts.append(f"CLIP scores by the CLIP {result['scorer']['tensors'][:12]}")
  parts.append(f"cm3leon_jax {result['version']}")
  return f"{', '.join(parts)}, on {result['device']}."

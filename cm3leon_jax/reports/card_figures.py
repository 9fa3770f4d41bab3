"""Collects the measured figures of a trained model, and how each figure was measured."""

import dataclasses

from etils import epath

from cm3leon_jax import worlds
from cm3leon_jax.evaluation.intervals import describe_share
from cm3leon_jax.evaluation.protocols.metrics import METRICS
from cm3leon_jax.evaluation.protocols.results import RESULTS, number, with_interval
from cm3leon_jax.files.json_files import read_json
from cm3leon_jax.reports import instruction_section
from cm3leon_jax.reports import summary as summary_lib
from cm3leon_jax.runs import stages
from cm3leon_jax.trained.run import Run

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


def collect(run: Run, step: int, summary: dict) -> dict[str, list]:
  """Collects the figures in a workdir that were measured with the parameters of a step.

  Returns {"tables": tables of figures, "missing": sentences about measurements that are missing or
  belong to other parameters}.

  Raises:
    UserError: a file is damaged.
  """
  workdir = run.folder
  tables, missing = [], []
  for name in TITLES:
    if table := _stage_table(run, name, summary):
      if name == "evaluation" and not _is_of(workdir, name, step):
        missing.append(
          "`cm3leon evaluate`: its figures belong to another training and are omitted."
        )
      else:
        tables.append(table)
    elif name == "evaluation":
      missing.append(
        "`cm3leon evaluate` (bits of held-out documents, judged images): not evaluated."
      )
  if (workdir / "grades" / stages.DONE).exists():
    if _is_of(workdir, "grades", step):
      tables.append(_grades(workdir))
    else:
      missing.append(
        "`cm3leon grade_instructions`: its figures belong to another training and are omitted."
      )
  elif (workdir / "instructions").exists():
    missing.append("`cm3leon grade_instructions` (answers to instructions).")
  protocols, others = _protocols(workdir, step)
  tables += protocols
  if others:
    missing.append(
      f"`cm3leon evaluate --protocol`: {others} results belong to other parameters and are omitted."
    )
  if not protocols:
    missing.append(
      "`cm3leon evaluate --protocol` (the field's metrics: FID, CMMD, CLIP score, CIDEr, VQA "
      "accuracy)."
    )
  return {"tables": tables, "missing": missing}


def _is_of(workdir: epath.Path, name: str, step: int) -> bool:
  """Returns whether a stage measured the parameters that the current training has at `step`."""
  done = read_json(workdir / name / stages.DONE, {"config": dict, "summary": dict})
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
    return (
      "`cm3leon train_vqgan`: images of held-out pairs are encoded and decoded. Near duplicates of "
      "training images are excluded."
    )
  if name == "train":
    return (
      f"`cm3leon train`, at the last step: {run.settings.train.eval_batches} batches of held-out "
      "documents. Each document follows the neighbors that its caption retrieves; only targets in "
      "the document itself count."
    )
  config = read_json(run.folder / name / stages.DONE, {"config": dict})["config"]
  found, fields = summary[name], config.get("evaluation", {})
  texts = [
    f"`cm3leon evaluate`, seed {config.get('seed')}: bits of {found.get('documents')} held-out "
    "pairs. Their captions retrieve the neighbors."
  ]
  for judged in (found[name] for name in worlds.MODULES if name in found):
    weights = ", ".join(f"{x:g}" for x in fields.get("scene_guidance", ()))
    texts.append(
      f"Images for {fields.get('scenes')} held-out captions are sampled at guidance {weights} and "
      f"judged exactly. Neighbors before a caption: {fields.get('scene_neighbors')}. The figures "
      f"are for the best weight, {judged.get('best', {}).get('title', 'of those')}."
    )
  return " ".join(texts)


def _grades(workdir: epath.Path) -> Table:
  """Returns a table with the shares of correct answers to held-out instructions."""
  found = instruction_section.read(workdir, lambda path: None)
  assert found is not None
  config = read_json(workdir / "grades" / stages.DONE, {"config": dict})["config"]
  rows = [
    (row["label"], f"{row['answers']:,}", *map(describe_share, row["cells"]))
    for row in found["rows"]
  ]
  for kind, shares in found["means"].items():
    cells = (f"{shares[title]:.1%}" if title in shares else "-" for title in found["titles"])
    rows.append((f"mean of {kind}", "", *cells))
  how = (
    f"`cm3leon grade_instructions`, seed {config.get('seed')}: answers to held-out instructions "
    "are judged exactly. Before: the parameters before tuning. Redrawn: after tuning, about input "
    "images that the image tokenizer has reconstructed. Majority: always the most frequent "
    "answer. Any object: an answer from the objects of the image that ignores which object the "
    "question asks for. Copy: the input image. Tokenizer: the true image, encoded and decoded. "
    "Kept: everything that the instruction does not touch is unchanged."
  )
  return Table("Instructions", how, ("task", "answers", *found["titles"]), tuple(rows))


def _protocols(workdir: epath.Path, step: int) -> tuple[list[Table], int]:
  """Returns one table per protocol, and the number of results that belong to other parameters."""
  fields = {"name": str, "inputs": dict, "step": int, "columns": dict, "metrics": list}
  fields |= {"title": str, "examples": int, "seed": int, "version": str, "device": str}
  tables, others = [], 0
  for path in sorted((workdir / EVALUATIONS).glob(f"*/{RESULTS}")):
    result = read_json(path, fields)
    same = result["inputs"].get("train") == stages.train_id(workdir)
    if not same or result["step"] != step or "parameters" in result:
      others += 1
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
    tables.append(
      Table(result["title"], _how_by_protocol(result), ("column", *titles), tuple(rows))
    )
  return tables, others


def _how_by_protocol(result: dict) -> str:
  """Names the protocol, number of examples, scoring models and code version of a result."""
  parts = [f"Protocol `{result['name']}`, {result['examples']:,} examples, seed {result['seed']}"]
  if result.get("extractor"):
    parts.append(f"features by {result['extractor']['name']}")
  if result.get("scorer"):
    parts.append(f"CLIP scores by the CLIP {result['scorer']['tensors'][:12]}")
  parts.append(f"cm3leon_jax {result['version']}")
  return f"{', '.join(parts)}, on {result['device']}."

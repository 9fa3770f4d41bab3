"""Every number of a run in one dict: what the stages left in their folders, and the headline figures with their targets."""

import dataclasses
import itertools

from etils import epath
import numpy as np

from cm3leon_jax import stages
from cm3leon_jax.config import UserError
from cm3leon_jax.evaluation.intervals import mean_interval
from cm3leon_jax.io import plain, read_json, read_json_lines


@dataclasses.dataclass(frozen=True)
class Headline:
  """One figure that the run is judged by.

  Attributes:
    title: what is measured, with its unit.
    path: where it stands in the summary, dotted.
    better: ">=" or "<=" a target, ">" or "<" another number of the summary, or "" without a target.
    target: number, or the dotted path of the number to compare with.
    note: what the target is.
  """

  title: str
  path: str
  better: str = ""
  target: float | str = ""
  note: str = ""


HEADLINES = (
  Headline("PSNR of reconstructions, held-out concepts (dB)", "vqgan.psnr_db", ">=", 22.0),
  Headline(
    "Codebook perplexity, held-out concepts (codes)",
    "vqgan.codebook_perplexity",
    ">=",
    250.0,
    "of 512 codes",
  ),
  Headline(
    "Recall@2 of the neighbor search against exact search", "neighbors.recall@2", ">=", 0.95
  ),
  Headline(
    "CLIP text-to-image recall@1, held-out concepts",
    "clip.recall@1",
    ">",
    "clip.chance@1",
    "chance",
  ),
  Headline(
    "CLIP text-to-image recall@5, held-out concepts",
    "clip.recall@5",
    ">",
    "clip.chance@5",
    "chance",
  ),
  Headline(
    "Bits per image code, true neighbors",
    "evaluation.image.true.bits",
    "<",
    "evaluation.image.unigram",
    "unigram model",
  ),
  Headline(
    "The same, divided by the unigram model's",
    "evaluation.image.true_over_unigram",
    "<=",
    0.5,
    "aim of the demo",
  ),
  Headline(
    "The same, divided by the unigram model's",
    "evaluation.image.true_over_unigram",
    "<=",
    0.42,
    "aim of :long",
  ),
  Headline(
    "Bits per text token, true neighbors",
    "evaluation.text.true.bits",
    "<",
    "evaluation.text.unigram",
    "unigram model",
  ),
  Headline(
    "True minus shuffled neighbors (bits/code)",
    "evaluation.image.true_minus_shuffled.bits",
    "<",
    0.0,
    "95% interval over concepts",
  ),
  Headline(
    "True minus no neighbors (bits/code)",
    "evaluation.image.true_minus_none.bits",
    "<",
    0.0,
    "95% interval over concepts",
  ),
)


def lookup(summary: dict, path: str):
  """`lookup({"a": {"b": 1}}, "a.b") == 1`; None where nothing stands."""
  value = summary
  for name in path.split("."):
    if not isinstance(value, dict) or name not in value:
      return None
    value = value[name]
  return value


def judge(summary: dict, headline: Headline) -> dict:
  """{"title", "value", "target", "note", "met"}: `value` is None if the stage has not run, `met` None without a verdict.

  A difference with an interval beside it is met only if the whole interval is.
  """
  value = lookup(summary, headline.path)
  target = lookup(summary, headline.target) if isinstance(headline.target, str) else headline.target
  parent = lookup(summary, headline.path.rpartition(".")[0]) or {}
  interval = (
    [parent["low"], parent["high"]] if headline.path.endswith(".bits") and "low" in parent else None
  )
  met = None
  if value is not None and target is not None and headline.better:
    worst = value if interval is None else interval[1] if "<" in headline.better else interval[0]
    met = {">=": worst >= target, "<=": worst <= target, ">": worst > target, "<": worst < target}[
      headline.better
    ]
  relation = f"{headline.better} " if headline.better else ""
  return {
    "title": headline.title, "value": value, "interval": interval, "relation": relation, "target": target,
    "note": headline.note, "met": met,
  }  # fmt: skip


def clip_scores(results: list[dict]) -> list[dict]:
  """Averages the CLIP scores of the samples by guidance and number of retrieved documents.

  Samples of one concept, or else of one prompt, resemble each other: intervals are over concepts.

  Args:
    results: lines of results.jsonl with guidance, retrieve, clip_score and prompt; the concept or
      key of a held-out pair are "" or absent if the prompt is the user's.

  Returns:
    A dict for each guidance and number of retrieved documents, in order: guidance, retrieve,
    samples, standard_deviation (of the samples), and mean, low, high, groups, effective_groups
    (`intervals.mean_interval`).
  """
  columns = {}
  for result in results:
    columns.setdefault((result["guidance"], result["retrieve"]), []).append(result)
  rows = []
  for (guidance, retrieve), column in sorted(columns.items()):
    scores = [result["clip_score"] for result in column]
    concepts = [r.get("concept") or r.get("key") or r["prompt"] for r in column]
    rows.append(
      {
        "guidance": guidance,
        "retrieve": retrieve,
        "samples": len(scores),
        "standard_deviation": float(np.std(scores, ddof=1)) if len(scores) > 1 else 0.0,
        **mean_interval(scores, np.ones(len(scores)), concepts),
      }
    )
  return rows


def restarts(metrics: list[dict]) -> list[dict]:
  """Where a trainer was started again: the log's first step of each start has no rate yet.

  Args:
    metrics: lines of metrics.jsonl.

  Returns:
    One dict a restart: after_step, the last step before it; next_step, the first one after it; and, where the first run
    had logged steps that the second computed again, replayed (their number) and identical (those whose loss is the same,
    bit for bit).
  """
  steps = [line for line in metrics if "loss" in line]
  found = [
    {"after_step": before["step"], "next_step": line["step"]}
    for before, line in itertools.pairwise(steps)
    if "tokens_per_second" not in line
  ]
  for event in (line for line in metrics if line.get("event") == "resumed"):
    for restart in found:
      if restart["after_step"] == event["from_step"]:
        restart.update(replayed=event["replayed"], identical=event["identical"])
  return found


def training(metrics: list[dict]) -> dict:
  """Numbers of the training log.

  Returns:
    logged_steps; every_step_logged_once: no restart lost or repeated one; restarts; median_tokens_per_second;
    step_seconds, of all steps that have a rate; last_loss and its parts, means over the last 5% of the steps; and where
    the trainer told them, goodput and wall_seconds, of all starts.
  """
  steps = [line for line in metrics if "loss" in line]
  if not steps:
    return {}
  rated = [line for line in steps if "tokens_per_second" in line]
  tail = steps[-max(len(steps) // 20, 1) :]
  losses = [name for name in ("loss", "image_loss", "text_loss") if name in tail[0]]
  told = {}
  for line in (line for line in metrics if "goodput" in line):
    seconds = sum(value for name, value in line.items() if name.endswith("_seconds"))
    told = {"goodput": line["goodput"], "wall_seconds": round(seconds, 1)}
  return {
    "logged_steps": len(steps),
    "every_step_logged_once": [line["step"] for line in steps] == list(range(1, len(steps) + 1)),
    "restarts": restarts(metrics),
    "median_tokens_per_second": float(np.median([line["tokens_per_second"] for line in rated]))
    if rated
    else None,
    "step_seconds": round(sum(line["weight"] / line["tokens_per_second"] for line in rated), 1),
    **{f"last_{name}": float(np.mean([line[name] for line in tail])) for name in losses},
    **told,
  }


def read_results(workdir: epath.PathLike) -> list[dict]:
  """Lines of samples/results.jsonl, [] if there are none yet."""
  return read_json_lines(epath.Path(workdir) / "samples" / "results.jsonl")


def collect(workdir: epath.PathLike) -> dict:
  """Gathers a run.

  Args:
    workdir: of the run, finished or not.

  Returns:
    Plain dict: a section for each finished stage with its numbers and `seconds`; `train.log`; `samples.clip_score`;
    `total_seconds`; `unfinished`, the stages that have not run; `headlines`.

  Raises:
    UserError: the workdir does not exist, or a file in it is damaged.
  """
  workdir = epath.Path(workdir)
  if not workdir.exists():
    raise UserError(f"--workdir {workdir} does not exist: name the folder of a run.")
  summary, seconds = {}, {}
  for folder in stages.STAGES:
    if (workdir / folder / stages.DONE).exists():
      done = read_json(workdir / folder / stages.DONE)
      seconds[folder] = done["seconds"]
      summary[folder] = {**done["summary"], "seconds": done["seconds"]}
  log = training(read_json_lines(workdir / "train" / "metrics" / "metrics.jsonl"))
  if log:
    train = summary.setdefault("train", {})
    train["log"] = log
    if "train" in seconds:  # The stage's own time is that of its last start.
      train["seconds"] = seconds["train"] = max(
        seconds["train"], log.get("wall_seconds", log["step_seconds"])
      )
  scores = clip_scores(read_results(workdir))
  if scores:
    summary.setdefault("samples", {})["clip_score"] = scores
  summary["total_seconds"] = round(sum(seconds.values()), 1)
  summary["unfinished"] = [folder for folder in stages.STAGES if folder not in seconds]
  summary["headlines"] = [judge(summary, headline) for headline in HEADLINES]
  return plain(summary)


def flatten(value, where: str = "") -> list[tuple[str, object]]:
  """Leaves of nested dicts and lists with their dotted names, in order.

  {"a": {"b": 1, "c": [2, 3]}} -> [("a.b", 1), ("a.c.0", 2), ("a.c.1", 3)]
  """
  if isinstance(value, dict | list):
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return [
      leaf
      for name, item in items
      for leaf in flatten(item, f"{where}.{name}" if where else str(name))
    ]
  return [(where, value)]

"""Collects the numbers of a run, and compares its headline figures with their targets."""

import itertools
import operator
from typing import Any, NamedTuple

from etils import epath
import numpy as np

from cm3leon_jax.config.settings import settings_from_stored
from cm3leon_jax.errors import UserError
from cm3leon_jax.evaluation.intervals import describe_groups, mean_interval
from cm3leon_jax.files.json_files import lacks, plain, read_json, read_json_lines
from cm3leon_jax.generation import lookalikes
from cm3leon_jax.generation.sample import describe_found
from cm3leon_jax.run import initial
from cm3leon_jax.stages import table
from cm3leon_jax.stages.stages import DONE
from cm3leon_jax.training.watch.heldout import OF_PAIRS, decisive
from cm3leon_jax.weights import reading

JUDGED = "judged"  # Name of a JSON file of the workdir and of a section of the summary.
COMPARISONS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}


class Headline(NamedTuple):
  """One of the main figures of a run, and its target.

  Attributes:
    title: what is measured, with its unit.
    path: dotted path of the figure in the summary.
    better: how a good figure compares with the target: ">=", "<=", ">" or "<".
    target: a number, the dotted path of a number in the summary, or None.
    note: what the target is, e.g. "chance".
  """

  title: str
  path: str
  better: str
  target: float | str | None
  note: str = ""


CLIP_RECALL = "CLIP text-to-image recall@{}, held-out concepts"
# fmt: off
HEADLINES = (
  Headline("PSNR of reconstructions, held-out images (dB)", "vqgan.psnr_db", ">=", 20.0),
  Headline(
    "Recall@2 of the neighbor search against exact search", "neighbors.recall@2", ">=", 0.95),
  *(Headline(CLIP_RECALL.format(k), f"clip.recall@{k}", ">", f"clip.chance@{k}", "chance")
    for k in (1, 5)),
  *(Headline(f"Bits per {what}, true neighbors", f"evaluation.{name}.true.bits", "<",
             f"evaluation.{name}.unigram", "unigram model")
    for what, name in (("image code", "image"), ("text token", "text"))),
  *(Headline(f"True minus {other} neighbors (bits/code)", f"evaluation.image.{name}.bits", "<", 0.0)
    for other, name in (("shuffled", "true_minus_shuffled"), ("no", "true_minus_none"))),
)
# fmt: on


def lookup(summary: Any, path: str) -> Any:
  """Returns the value at a dotted path, or None if absent: lookup({"a": {"b": 1}}, "a.b") = 1."""
  value = summary
  for name in path.split("."):
    if not isinstance(value, dict) or name not in value:
      return None
    value = value[name]
  return value


def compare(summary: dict, headline: Headline) -> dict:
  """Compares a headline figure with its target.

  A figure with a confidence interval meets the target only if the whole interval meets it.

  Returns {"title", "value", "interval", "relation", "target", "note", "met"}. `interval` has low,
  high and groups (`intervals.mean_interval`), or is None. `value` is None if the stage has not run.
  `met` is None if the summary lacks the value or the target.
  """
  value = lookup(summary, headline.path)
  target = lookup(summary, headline.target) if isinstance(headline.target, str) else headline.target
  parent = lookup(summary, headline.path.rpartition(".")[0]) or {}
  interval = met = None
  if parent.get("low") is not None:
    names = ("low", "high", "groups", "effective_groups")
    interval = {name: parent[name] for name in names if name in parent}
  if value is not None and target is not None:
    worst = value if interval is None else interval["high" if "<" in headline.better else "low"]
    met = COMPARISONS[headline.better](worst, target)
  return {
    "title": headline.title,
    "value": value,
    "interval": interval,
    "relation": f"{headline.better} ",
    "target": target,
    "note": headline.note or ("whole interval" if interval and met is not None else ""),
    "met": met,
  }


def headlines(summary: dict) -> list[Headline]:
  """Returns the headline figures of a run: first those of judged.json, then those of its stages.

  A copied stage trains nothing, so it has no figures.
  """
  figures = summary.get(JUDGED, {}).items()
  own = [Headline(f["title"], f"{JUDGED}.{i}.value", ">=", f.get("target")) for i, f in figures]
  copied = [name for name in summary if lookup(summary, f"{name}.copied_from")]
  return own + [line for line in HEADLINES if line.path.partition(".")[0] not in copied]


def clip_scores(results: list[dict]) -> list[dict]:
  """Averages the CLIP scores of samples by guidance weight and number of retrieved documents.

  Confidence intervals resample concepts, because samples of one concept are similar. For samples
  without a concept, they resample prompts.

  Args:
    results: lines of results.jsonl with guidance, retrieve, neighbors, clip_score and prompt. The
      concept and key of a held-out pair are "" or absent for a prompt from the user.

  Returns:
    One dict per guidance weight and number of retrieved documents, sorted by both: guidance,
    retrieve, found (numbers of documents), samples (their number), standard_deviation (over
    the samples), and mean, low, high, groups, effective_groups (see `intervals.mean_interval`).
  """
  columns: dict[tuple[float, int], list[dict]] = {}
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
        "found": sorted({len(result["neighbors"]) for result in column}),
        "samples": len(scores),
        "standard_deviation": float(np.std(scores, ddof=1)) if len(scores) > 1 else 0.0,
        **mean_interval(scores, np.ones(len(scores)), concepts),
      }
    )
  return rows


def describe_clip_score(row: dict, noun: str = "concept") -> str:
  """Formats a row of `clip_scores` as a sentence. `noun` names what the interval resamples."""
  samples = "1 sample" if row["samples"] == 1 else f"{row['samples']} samples"
  interval = "" if row["low"] is None else f" [{row['low']:.3f}, {row['high']:.3f}]"
  return (
    f"guidance {row['guidance']:g}, {describe_found(row['found'], row['retrieve'])}: CLIP score "
    f"{row['mean']:.3f}{interval}, {samples} of {describe_groups(row, noun)}."
  )


def _step_lines(metrics: list[dict]) -> list[dict]:
  """Returns the metrics lines that describe a step. The line of a skipped step may have no loss."""
  return [line for line in metrics if "loss" in line or line.get("skipped")]


def restarts(metrics: list[dict]) -> list[dict]:
  """Finds the restarts in a training log: steps that lack `tokens_per_second`.

  Returns one dict per restart: `after_step`, the last step before it, and `next_step`, the first
  step after it. If steps that were already logged were computed again, the dict also has
  `replayed`, their number, and `identical`, how many of them have bitwise the same loss as before.
  """
  result = [
    {"after_step": before["step"], "next_step": line["step"]}
    for before, line in itertools.pairwise(_step_lines(metrics))
    if "tokens_per_second" not in line
  ]
  for event in (line for line in metrics if line.get("event") == "resumed"):
    for restart in result:
      if restart["after_step"] == event["from_step"]:
        restart.update(replayed=event["replayed"], identical=event["identical"])
  return result


def training(metrics: list[dict]) -> dict:
  """Summarizes a training log.

  Returns:
    {} without steps; otherwise a dict with these entries:
    - logged_steps, last_step: number of steps, and the last of them.
    - every_step_logged_once: whether no step is missing or repeated.
    - restarts: result of `restarts`.
    - median_tokens_per_second.
    - step_seconds: total time of the steps with a logged tokens_per_second.
    - last_loss, last_image_loss, last_text_loss: means over the last 5% of the steps.
    - goodput, wall_seconds: over all starts, if they were logged.
  """
  steps = [line for line in metrics if "loss" in line]
  if not steps:
    return {}
  logged = [line["step"] for line in _step_lines(metrics)]
  rated = [line for line in steps if "tokens_per_second" in line]
  rates = [line["tokens_per_second"] for line in rated]
  tail = steps[-max(len(steps) // 20, 1) :]
  losses = [name for name in ("loss", "image_loss", "text_loss") if name in tail[0]]
  goodput = {}
  for line in (line for line in metrics if "goodput" in line):
    seconds = sum(value for name, value in line.items() if name.endswith("_seconds"))
    goodput = {"goodput": line["goodput"], "wall_seconds": round(seconds, 1)}
  return {
    "logged_steps": len(logged),
    "last_step": logged[-1],
    "every_step_logged_once": logged == list(range(1, len(logged) + 1)),
    "restarts": restarts(metrics),
    "median_tokens_per_second": float(np.median(rates)) if rates else None,
    "step_seconds": round(sum(line["weight"] / line["tokens_per_second"] for line in rated), 1),
    **{f"last_{name}": float(np.mean([line[name] for line in tail])) for name in losses},
    **goodput,
  }


LOSSES = {"heldout_loss": "loss", "heldout_image_loss": "image loss", OF_PAIRS: "loss of pairs"}


def findings(summary: dict, metrics: list[dict]) -> list[str]:
  """Says what a user should know first about a run, from its numbers and the lines of its log."""
  counts = summary.get("samples", {}).get("lookalikes")
  result = [lookalikes.describe(counts)] if counts else []
  name = next((decisive(line) for line in metrics if line.get("heldout_loss")), "heldout_loss")
  losses = {x["step"]: x[name] for x in metrics if x.get(name) and x["step"]}  # 0: the base.
  used = summary.get("train", {}).get("used_step")
  best, last = min(losses, key=losses.__getitem__, default=0), max(losses, default=0)
  if best < last:
    rise = losses[last] / losses[best] - 1
    result.append(
      f"warning: held-out {LOSSES[name]}: lowest at step {best:,}, "
      f"{losses[best]:.3f}; at the last step, {last:,}, {losses[last]:.3f} ({rise:+.1%}), so the "
      f"later steps overfit the training data; the run uses step {used or last:,}."
    )
  return result


def read_results(workdir: epath.PathLike) -> list[dict]:
  """Returns the lines of samples/results.jsonl, or [] if the file does not exist."""
  return read_json_lines(epath.Path(workdir) / "samples" / "results.jsonl")


def collect(workdir: epath.PathLike) -> dict:
  """Collects the numbers of a run, which may be unfinished.

  Returns a JSON-serializable dict: `findings` (see that function); one section per finished stage,
  with its numbers and `seconds`;
  `train.log`; `samples.clip_score`; `total_seconds`; `unfinished`, the stages that have not
  finished; and `headlines` (`compare`).

  Raises:
    UserError: the workdir does not exist, or a file in it is damaged.
  """
  workdir = epath.Path(workdir)
  if not workdir.exists():
    raise UserError(f"--workdir {workdir} does not exist: name the folder of a run.")
  summary: dict[str, Any] = {}
  seconds: dict[str, float] = {}
  for folder in table.STAGES:
    if (workdir / folder / DONE).exists():
      done = read_json(workdir / folder / DONE, {"summary": dict, "seconds": float})
      seconds[folder] = done["seconds"]
      summary[folder] = {**done["summary"], "seconds": done["seconds"]}
  metrics = read_json_lines(workdir / "train" / "metrics" / "metrics.jsonl", {"step": int})
  if log := training(metrics):
    train = summary.setdefault("train", {})
    planned = _stored_settings(workdir).get("train", {}).get("steps")
    train["log"] = {**log, "planned_steps": planned or log["last_step"]}
    train["used_step"] = reading.used_step(workdir / "train")
    if "train" in seconds:  # The stage itself records only the time since its last start.
      train["seconds"] = seconds["train"] = max(
        seconds["train"], log.get("wall_seconds", log["step_seconds"])
      )
  scores = clip_scores(read_results(workdir))
  if scores:
    summary.setdefault("samples", {})["clip_score"] = scores
  if result := judged(workdir):
    summary[JUDGED] = result
  summary["total_seconds"] = round(sum(seconds.values()), 1)
  expected = expected_stages(workdir)
  summary["unfinished"] = [folder for folder in expected if folder not in seconds]
  summary["headlines"] = [
    compare(summary, headline)
    for headline in headlines(summary)
    if headline.path.partition(".")[0] in (*expected, *summary)
  ]
  return plain({"findings": findings(summary, metrics), **summary})


def judged(workdir: epath.Path) -> dict[str, dict]:
  """Reads judged.json, which a judge outside the pipeline wrote: figures keyed "0", "1", ...

  Raises:
    UserError: the file is damaged, or a figure lacks its title or value.
  """
  path, fields = workdir / f"{JUDGED}.json", {"title": str, "value": float}
  if not path.exists():
    return {}
  figures = read_json(path, {"figures": list}, "write it again")["figures"]
  for figure in figures:
    if lack := lacks(figure, fields):
      raise UserError(f"{path}, a figure: {lack}; write the file again.")
  return {str(number): figure for number, figure in enumerate(figures)}


def expected_stages(workdir: epath.Path) -> list[str]:
  """Returns the stages of a run that it must finish, and the stages that it has finished.

  Some stages only belong to runs that tune another run. A run that tunes on instructions has the
  stages that its config needs.
  """
  stored = _stored_settings(workdir)
  settings = settings_from_stored(stored) if stored else None
  if settings and settings.instructions.any:
    needed = set(table.order(settings, given=True))
  else:
    tunes = {"instructions"} if (workdir / "instructions").exists() else set()
    tunes |= {"forgetting"} if settings and settings.data.base_documents else set()
    needed = table.STAGES.keys() - {"instructions", "forgetting"} | tunes
  return [name for name in table.STAGES if name in needed or (workdir / name / DONE).exists()]


def _stored_settings(workdir: epath.Path) -> dict:
  """Returns the settings that `cm3leon train` stored; {} if there are none."""
  path = workdir / "train" / "config.json"
  return read_json(path, {}).get("settings", {}) if path.exists() else {}


def cost(summary: dict) -> dict | None:
  """Returns how long a run took to train its decoder, or None if the decoder is not trained.

  Returns:
    {"train_seconds": time of the stage `train`, "other_seconds": time of all earlier stages,
    "machine": machine that trained the decoder, or None if it is unknown}.
  """
  if "seconds" not in summary.get("train", {}):
    return None
  earlier = itertools.takewhile(lambda name: name != "train", table.STAGES)
  before = [summary[name]["seconds"] for name in earlier if name in summary]
  train = summary["train"]
  machine, seconds = train.get("machine"), round(sum(before), 1)
  return {"train_seconds": train["seconds"], "other_seconds": seconds, "machine": machine}


def total_cost(workdir: epath.PathLike) -> dict | None:
  """Returns the cost of a run; "train_seconds" includes the trainings of the runs before it."""
  if (result := cost(collect(workdir))) is not None:
    result["train_seconds"] += initial.seconds_before(workdir)
  return result

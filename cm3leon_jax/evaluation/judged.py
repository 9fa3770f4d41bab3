"""Generates images for held-out captions, and judges them by the facts of the captions.

The judge is a function of the user, which `config.evaluation.judge` names as FILE.py:FUNCTION.
"""

# n images, H height, W width.

from collections import Counter
from collections.abc import Callable, Sequence
import json
from typing import Any

from etils import epath
import numpy as np

from cm3leon_jax.config import own_functions
from cm3leon_jax.config.settings import Settings
from cm3leon_jax.evaluation import intervals
from cm3leon_jax.evaluation.judged_sheet import SheetImages, render
from cm3leon_jax.files.atomic import replacing
from cm3leon_jax.generation.heldout import HeldoutCaption
from cm3leon_jax.generation.pipeline import Pipeline
from cm3leon_jax.generation.retrieved import images_of
from cm3leon_jax.generation.sample import Sample
from cm3leon_jax.generation.tasks import slug
from cm3leon_jax.generation.writer import save_png

# (image, uint8 [H, W, 3]; facts of its caption) -> "" if the image shows them, else what is wrong.
Judge = Callable[[np.ndarray, dict], str]
LINES, FOLDER, SHEET = "judged.jsonl", "judged", "judged.png"
# Title of the table whose shares no model can beat: reconstructions of the true images.
RECONSTRUCTED = "reconstructions"
STRATA = ("tag", "heldout")  # Fields of the facts whose values split a table into rows.
ON_SHEET = 12  # Number of captions on the sheet.


def judge_of(settings: Settings) -> Judge | None:
  """Imports the judge of the settings, which must come from the user's own --config."""
  name = settings.evaluation.judge
  return own_functions.load(name, "evaluation.judge") if name else None


def judge_all(judge: Judge, images: Sequence[np.ndarray] | np.ndarray, facts: Any) -> list[str]:
  """Returns the verdict on each of n images, uint8 [H, W, 3]: what is wrong, or ""."""
  return [str(judge(np.asarray(image), fact)) for image, fact in zip(images, facts, strict=True)]


def evaluate(
  pipeline: Pipeline, tasks: Sequence[HeldoutCaption], judge: Judge, folder: epath.PathLike
) -> dict[str, Any]:
  """Generates and judges an image per task.

  Writes each image to judged/, judged.jsonl with a line per image, and judged.png, the images of a
  few captions. `tasks` is the result of `strata.heldout_captions`; the mesh must be set.

  Returns {"tables": {title: table}, "best": title of the guidance weight with the most correct
  images}. Titles are RECONSTRUCTED and a title per weight, e.g. "guidance 1.5". A table maps "all",
  and each value of the fields STRATA of the facts, to {"images": number, "correct": {share, low,
  high, groups, effective_groups}}.
  """
  folder, settings = epath.Path(folder), pipeline.settings
  samples = [of_task[0] for of_task in pipeline.generate(tasks, show_progress=True)]
  by_weight: dict[str, list[Sample]] = {}
  for sample in samples:
    by_weight.setdefault(f"guidance {sample.task.sampling.guidance:g}", []).append(sample)
  first = [_task_of(sample) for sample in next(iter(by_weight.values()))]
  facts = [task.document.facts for task in first]
  images = {
    RECONSTRUCTED: [np.asarray(task.original) for task in first],
    **{title: [sample.segments[0] for sample in some] for title, some in by_weight.items()},
  }
  wrong = {title: judge_all(judge, some, facts) for title, some in images.items()}
  _write_lines(folder, first, images, wrong)
  sheet = _sheet(pipeline, by_weight, images, wrong)
  save_png(folder / SHEET, render(sheet))
  concepts = [task.concept or task.key for task in first]
  options = (settings.evaluation.num_resamples, settings.seed)
  tables = {title: _table(facts, concepts, some, *options) for title, some in wrong.items()}
  best = max(by_weight, key=lambda title: tables[title]["all"]["correct"]["share"])
  return {"tables": tables, "best": best}


def _task_of(sample: Sample) -> HeldoutCaption:
  """Returns the held-out caption that a sample was generated for."""
  assert isinstance(sample.task, HeldoutCaption)
  return sample.task


def _write_lines(
  folder: epath.Path,
  tasks: Sequence[HeldoutCaption],
  images: dict[str, list[np.ndarray]],
  wrong: dict[str, list[str]],
) -> None:
  """Writes the images of all titles, each of which has one image per task, and their lines."""
  lines = []
  for title in images:
    for i, (task, image, reason) in enumerate(zip(tasks, images[title], wrong[title])):
      name = f"{FOLDER}/{slug(title)}_{i:04d}.png"
      save_png(folder / name, image)
      line = {"file": name, "title": title, "prompt": task.prompt, "concept": task.concept}
      about = {"correct": not reason, "reason": reason, "facts": task.document.facts}
      lines.append(json.dumps({**line, **about}) + "\n")
  with replacing(folder / LINES, "w") as file:
    file.write("".join(lines))


def _table(
  facts: Sequence[dict], concepts: Sequence[str], wrong: Sequence[str], resamples: int, seed: int
) -> dict[str, Any]:
  """Computes the shares of correct images over all, and for each value of the fields STRATA."""
  rows = {"all": list(range(len(facts)))}
  for field in STRATA:
    for value in sorted({str(one.get(field, "")) for one in facts} - {""}):
      label = value if field == "tag" else f"held-out: {value}"
      rows[label] = [i for i, one in enumerate(facts) if one.get(field) == value]
  table = {}
  for label, some in rows.items():
    correct, groups = [not wrong[i] for i in some], [concepts[i] for i in some]
    found = intervals.mean_interval(correct, np.ones(len(some)), groups, resamples, seed)
    table[label] = {"images": len(some), "correct": {"share": found.pop("mean"), **found}}
  return table


def _sheet(
  pipeline: Pipeline,
  by_weight: dict[str, list[Sample]],
  images: dict[str, list[np.ndarray]],
  wrong: dict[str, list[str]],
) -> list[SheetImages]:
  """Returns the images of a few captions, chosen at random and evenly from the tags."""
  every = next(iter(by_weight.values()))
  tags = [str(_task_of(sample).document.facts.get("tag", "")) for sample in every]
  chosen = spread(tags, ON_SHEET, pipeline.settings.seed)
  shown = iter(images_of(pipeline, [d for i in chosen for d in every[i].neighbors]))
  return [
    SheetImages(
      caption=every[i].task.prompt,
      original=images[RECONSTRUCTED][i],
      neighbors=tuple(next(shown) for _ in every[i].neighbors),
      samples={title: (images[title][i], not wrong[title][i]) for title in by_weight},
    )
    for i in chosen
  ]


def spread(tags: Sequence[str], count: int, seed: int) -> list[int]:
  """Chooses up to `count` random indices: one index of each tag, then another of each tag, etc.

  spread(["a", "a", "a", "b"], 3, seed) has index 3, and two of the indices 0, 1 and 2.
  """
  seen: Counter[str] = Counter()
  turns: dict[int, int] = {}
  for i in map(int, np.random.default_rng(seed).permutation(len(tags))):
    turns[i] = seen[tags[i]]
    seen[tags[i]] += 1
  return sorted(turns, key=lambda i: turns[i])[:count]


def describe(result: dict[str, Any]) -> str:
  """Formats the result of `evaluate` as text."""
  lines = []
  for title, table in result["tables"].items():
    row = table["all"]
    share = intervals.describe_share(row["correct"])
    lines.append(f"{title}: {row['images']} images, {share} show exactly what their captions say")
  return "\n".join(lines)

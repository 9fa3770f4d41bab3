"""Generates images for held-out captions, and judges them by the facts of the captions.

The judge is a function of the user, which `config.evaluation.judge` names as FILE.py:FUNCTION.
"""

# n images, H height, W width.

from collections.abc import Callable, Sequence
import dataclasses
import itertools
import json
from typing import Any

from etils import epath
import numpy as np
from PIL import Image

from cm3leon_jax.config import own_functions
from cm3leon_jax.config.settings import Settings
from cm3leon_jax.data.documents.store import DocumentStore
from cm3leon_jax.errors import UserError
from cm3leon_jax.evaluation import intervals
from cm3leon_jax.files.atomic import replacing
from cm3leon_jax.generation.heldout import HeldoutCaption, tasks_of_rows
from cm3leon_jax.generation.pipeline import Pipeline
from cm3leon_jax.generation.retrieved import images_of
from cm3leon_jax.generation.sample import Sample
from cm3leon_jax.generation.tasks import slug
from cm3leon_jax.generation.writer import contact_sheet, save_png

# (image, uint8 [H, W, 3]; facts of its caption) -> "" if the image shows them, else what is wrong.
Judge = Callable[[np.ndarray, dict], str]
LINES, FOLDER, SHEET = "judged.jsonl", "judged", "judged.png"
# Title of the table whose shares no model can beat: reconstructions of the true images.
RECONSTRUCTED = "reconstructions"
STRATA = ("tag", "heldout")  # Fields of the facts whose values split a table into rows.
ON_SHEET = 12  # Number of captions on the sheet.
# Frames of images on the sheet that the judge has not seen, finds correct, or finds wrong.
PLAIN, RIGHT, WRONG = (205, 205, 205), (0, 135, 75), (213, 60, 40)


def judge_of(settings: Settings) -> Judge | None:
  """Imports the judge of the settings, which must come from the user's own --config."""
  name = settings.evaluation.judge
  return own_functions.load(name, "evaluation.judge") if name else None


def choose(facts: Sequence[dict], count: int, seed: int) -> list[int]:
  """Chooses documents from the strata in turn.

  A stratum contains the documents with the same fields `tag` and `heldout` of their facts. `facts`
  contains the field `facts` of every held-out document: {} if they are unknown. Returns `count`
  indices into `facts`. The first indices, however many, are spread evenly over the strata.

  Raises:
    UserError: fewer than `count` documents have facts.
  """
  rng = np.random.default_rng([seed, len(facts)])
  groups: dict[tuple[str, str], list[int]] = {}
  for i in rng.permutation(len(facts)):
    if facts[i]:
      stratum = (str(facts[i].get("tag", "")), str(facts[i].get("heldout", "")))
      groups.setdefault(stratum, []).append(int(i))
  available = sum(map(len, groups.values()))
  if available < count:
    raise UserError(
      f"cannot choose {count} held-out captions, because only {available} held-out documents have "
      "facts: lower config.evaluation.captions, or prepare data whose records have `facts`."
    )
  ordered = [groups[key] for key in sorted(groups)]
  rounds = itertools.chain.from_iterable(itertools.zip_longest(*ordered))
  return [i for i in rounds if i is not None][:count]


def heldout_captions(
  pipeline: Pipeline, workdir: epath.PathLike, weights: Sequence[float]
) -> list[HeldoutCaption]:
  """Makes a task for each pair of a guidance weight and a chosen held-out caption.

  The tasks are sorted by weight, in the order of `weights`; duplicate weights are ignored. The seed
  chooses `evaluation.captions` captions with facts (see `choose`), or all if it is 0. The document
  stores and neighbors of `workdir` are read.

  Raises:
    UserError: too few held-out documents have facts.
  """
  store = DocumentStore(epath.Path(workdir) / "documents" / "heldout_pairs", pipeline.layout.vocab)
  facts = [store[i].facts for i in range(len(store))]
  settings, tokenizer = pipeline.settings, pipeline.image_tokenizer
  config, seed = settings.evaluation, settings.seed
  rows = choose(facts, config.captions or max(1, sum(map(bool, facts))), seed)
  columns = [
    (config.neighbors, dataclasses.replace(settings.sampling, guidance=weight))
    for weight in dict.fromkeys(weights)
  ]
  return tasks_of_rows(pipeline.layout, workdir, rows, seed, columns, image_tokenizer=tokenizer)


def judge_all(judge: Judge, images: Sequence[np.ndarray] | np.ndarray, facts: Any) -> list[str]:
  """Returns the verdict on each of n images, uint8 [H, W, 3]: what is wrong, or ""."""
  return [str(judge(np.asarray(image), fact)) for image, fact in zip(images, facts, strict=True)]


def evaluate(
  pipeline: Pipeline, tasks: Sequence[HeldoutCaption], judge: Judge, folder: epath.PathLike
) -> dict[str, Any]:
  """Generates and judges an image per task.

  Writes each image to judged/, judged.jsonl with a line per image, and judged.png, the images of a
  few captions. `tasks` is the result of `heldout_captions`; the mesh must be set.

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
  save_png(folder / SHEET, _sheet(pipeline, first, images, wrong))
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
    result = intervals.mean_interval(correct, np.ones(len(some)), groups, resamples, seed)
    table[label] = {"images": len(some), "correct": {"share": result.pop("mean"), **result}}
  return table


def _sheet(
  pipeline: Pipeline,
  tasks: Sequence[HeldoutCaption],
  images: dict[str, list[np.ndarray]],
  wrong: dict[str, list[str]],
) -> Image.Image:
  """Draws a row for each of a few captions, which the seed chooses.

  A row has the original image, the neighbors, and a framed sample per guidance weight. The label
  says which samples the judge finds correct.
  """
  weights = [title for title in images if title != RECONSTRUCTED]
  rng = np.random.default_rng(pipeline.settings.seed)
  chosen = np.sort(rng.permutation(len(tasks))[:ON_SHEET]).tolist()
  neighbors = iter(images_of(pipeline, [d for i in chosen for d in tasks[i].neighbors]))
  most = max(len(tasks[i].neighbors) for i in chosen)
  rows, labels = [], []
  for i in chosen:
    task = tasks[i]
    given = [_framed(images[RECONSTRUCTED][i], PLAIN)]
    given += [_framed(next(neighbors), PLAIN) for _ in task.neighbors]
    right = [not wrong[title][i] for title in weights]
    colors = [RIGHT if value else WRONG for value in right]
    samples = [_framed(images[title][i], color) for title, color in zip(weights, colors)]
    rows.append([*given, *[""] * (most - len(task.neighbors)), *samples])
    labels.append(f"{task.prompt}: {', '.join('correct' if value else 'wrong' for value in right)}")
  return contact_sheet(rows, labels, ["original", *["neighbor"] * most, *weights])


def _framed(image: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
  """Draws a frame of a color around an image, a sixteenth of its side wide."""
  width = max(1, len(image) // 16)
  padded = np.pad(image, ((width, width), (width, width), (0, 0)))
  inside = np.pad(np.ones(image.shape[:2], bool), width)[..., None]
  return np.where(inside, padded, np.array(color, np.uint8))


def describe(result: dict[str, Any]) -> str:
  """Formats the result of `evaluate` as text."""
  lines = []
  for title, table in result["tables"].items():
    row = table["all"]
    share = intervals.describe_share(row["correct"])
    lines.append(f"{title}: {row['images']} images, {share} show exactly what their captions say")
  return "\n".join(lines)

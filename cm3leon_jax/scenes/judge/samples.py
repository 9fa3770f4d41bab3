"""Generates images for held-out captions of scenes, judges the images and writes the results."""

# n scenes, H height, W width.

from collections import Counter
from collections.abc import Callable, Sequence
import json
from typing import Any

from etils import epath
import numpy as np

from cm3leon_jax.data.documents.store import DocumentStore
from cm3leon_jax.evaluation import intervals
from cm3leon_jax.files.atomic import replacing
from cm3leon_jax.files.json_files import write_json
from cm3leon_jax.generation.heldout import HeldoutCaption
from cm3leon_jax.generation.pipeline import Pipeline
from cm3leon_jax.generation.retrieved import images_of
from cm3leon_jax.generation.sample import Sample
from cm3leon_jax.generation.writer import save_png
from cm3leon_jax.scenes import drawings
from cm3leon_jax.scenes.config import Style
from cm3leon_jax.scenes.judge import errors, sheet
from cm3leon_jax.scenes.judge import judge as scenes
from cm3leon_jax.scenes.judge import table as scene_table
from cm3leon_jax.scenes.judge.baselines import Known, TrainingScenes
from cm3leon_jax.scenes.judge.sheet import SheetScene
from cm3leon_jax.scenes.judge.table import Judged
from cm3leon_jax.scenes.world import Placed, Scene

# Titles of the two tables whose shares are upper bounds for the samples.
REAL, RECONSTRUCTED = "real images", "reconstructions"
UNGUIDED = "guidance 1"
BUNDLED = "bundled model"
SHEET_SCENES = 12


def real_image(facts: dict, style: Style = "filled") -> np.ndarray:
  """Renders the image that the facts of a document describe: [H, W, 3] uint8."""
  placed = [Placed(thing["class"], thing["color"], thing["place"]) for thing in facts["objects"]]
  return drawings.render(Scene.of(placed), style)


def evaluate(
  pipeline: Pipeline,
  tasks: Sequence[HeldoutCaption],
  workdir: epath.PathLike,
  folder: epath.PathLike,
  bundled: Callable[[list[str]], list[np.ndarray]] | None = None,
) -> dict[str, dict]:
  """Generates and judges images. Writes them, scenes.json, scenes_results.jsonl and scenes.png.

  For comparison, the real images (drawn from the facts) and their reconstructions by the image
  tokenizer are also judged. Their shares are upper bounds for the samples.

  Args:
    pipeline: pipeline of the run, with its mesh set.
    tasks: result of `strata.heldout_captions`.
    workdir: folder of the run. The baseline `lookup` searches its training documents.
    bundled: generates one image per caption with the bundled model. It is called with the captions
      of scenes.png, which shows the result next to the images of the run.

  Returns:
    A dict with these entries:
    - "judge": result of `errors.measure`.
    - "tables": {title: result of `table.table`}. Titles are "real images", "reconstructions", and
      a title per guidance weight, e.g. "guidance 1.5".
    - "gain", if one of several weights is 1: `table.gain` of the best other weight over weight 1,
      and the title of the best other weight as "title".
    - "bundled", if `bundled` is given: {"images": number of captions in scenes.png, "right": {title
      of a weight or "bundled model": number of correct images}}.
  """
  folder, seed = epath.Path(folder), pipeline.settings.seed
  style = pipeline.settings.scenes.style
  samples = [of_task[0] for of_task in pipeline.generate(tasks, show_progress=True)]
  by_weight: dict[str, list[Sample]] = {}
  for sample in samples:
    by_weight.setdefault(f"guidance {sample.task.sampling.guidance:g}", []).append(sample)
  first = [_task_of(sample) for sample in next(iter(by_weight.values()))]
  facts = [task.document.facts for task in first]
  real = np.stack([real_image(fact, style) for fact in facts])
  columns = {
    REAL: real,
    RECONSTRUCTED: np.stack([np.asarray(task.original) for task in first]),
    **{title: np.stack([s.segments[0] for s in some]) for title, some in by_weight.items()},
  }
  trained = _trained(pipeline, workdir)
  known = [trained.known(task.prompt, task.document.facts) for task in first]
  judged = {title: _judge(first, images, style, known) for title, images in columns.items()}
  resamples = pipeline.settings.evaluation.num_resamples
  tables = {title: scene_table.table(some, resamples, seed) for title, some in judged.items()}
  result: dict[str, Any] = {"judge": errors.measure(real, facts, seed, style), "tables": tables}
  if UNGUIDED in tables and len(by_weight) > 1:
    title = best_guidance({name: tables[name] for name in by_weight if name != UNGUIDED})
    gain = scene_table.gain(judged[title], judged[UNGUIDED], resamples, seed)
    result["gain"] = {"title": title, **gain}
  _write_results(folder, samples, [one for title in by_weight for one in judged[title]])
  result |= _write_sheet(folder / "scenes.png", pipeline, by_weight, judged, bundled)
  write_json(folder / "scenes.json", result)
  return result


def _task_of(sample: Sample) -> HeldoutCaption:
  """Returns the held-out caption that a sample was generated for."""
  assert isinstance(sample.task, HeldoutCaption)
  return sample.task


def _write_results(folder: epath.Path, samples: Sequence[Sample], judged: Sequence[Judged]) -> None:
  """Writes the image of each sample, and GenEval's results with a line per sample."""
  lines = []
  for sample, one in zip(samples, judged):
    name = f"scenes/{sample.task.file_stem}.png"
    save_png(folder / name, sample.segments[0])
    weight = {"guidance": sample.task.sampling.guidance}
    lines.append(json.dumps({**scene_table.geneval_result(name, one), **weight}) + "\n")
  with replacing(folder / "scenes_results.jsonl", "w") as file:
    file.write("".join(lines))


def _trained(pipeline: Pipeline, workdir: epath.PathLike) -> TrainingScenes:
  """Reads the scenes that the training documents of the run show."""
  folder = epath.Path(workdir) / "documents" / "train_pairs"
  layout = pipeline.layout
  return TrainingScenes.of_store(DocumentStore(folder, layout.vocab), layout.decode)


def _judge(
  tasks: Sequence[HeldoutCaption], images: np.ndarray, style: Style, known: Sequence[Known | None]
) -> list[Judged]:
  """Judges one image, [H, W, 3] uint8, per task. `known` has one entry per task, see `Judged`."""
  facts = [task.document.facts for task in tasks]
  verdicts = scenes.judge_all(images, facts, style)
  return [
    Judged(task.prompt, fact, task.concept, verdict, has)
    for task, fact, verdict, has in zip(tasks, facts, verdicts, known)
  ]


def _write_sheet(
  path: epath.Path,
  pipeline: Pipeline,
  by_weight: dict[str, list[Sample]],
  judged: dict[str, list[Judged]],
  bundled: Callable[[list[str]], list[np.ndarray]] | None,
) -> dict[str, dict]:
  """Writes the sheet of scenes, which are chosen at random and evenly from the categories.

  `by_weight` and `judged` map the title of a guidance weight to the samples and judged images of n
  scenes. Returns the entry "bundled" of the result of `evaluate`, or {} if `bundled` is None.
  """
  every = next(iter(by_weight.values()))
  tags = [_task_of(sample).document.facts["tag"] for sample in every]
  chosen = spread(tags, SHEET_SCENES, pipeline.settings.seed)
  columns = {
    title: [(some[i].segments[0], judged[title][i].verdict.correct) for i in chosen]
    for title, some in by_weight.items()
  }
  samples = [every[i] for i in chosen]
  if bundled is not None:
    tasks = [_task_of(sample) for sample in samples]
    images = bundled([task.prompt for task in tasks])
    facts = [task.document.facts for task in tasks]
    verdicts = [one.correct for one in scenes.judge_all(np.stack(images), facts)]
    columns[BUNDLED] = list(zip(images, verdicts))
  save_png(path, sheet.render(_sheet_scenes(pipeline, samples, columns)))
  if bundled is None:
    return {}
  right = {title: sum(correct for _, correct in column) for title, column in columns.items()}
  return {"bundled": {"images": len(chosen), "right": right}}


def _sheet_scenes(
  pipeline: Pipeline, samples: Sequence[Sample], columns: dict[str, list[tuple[np.ndarray, bool]]]
) -> list[SheetScene]:
  """Returns the scenes of n samples, each with one image and its verdict per column."""
  images = iter(images_of(pipeline, [d for sample in samples for d in sample.neighbors]))
  return [
    SheetScene(
      caption=sample.task.prompt,
      original=real_image(_task_of(sample).document.facts, pipeline.settings.scenes.style),
      neighbors=tuple(next(images) for _ in sample.neighbors),
      samples={title: column[i] for title, column in columns.items()},
    )
    for i, sample in enumerate(samples)
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


def best_guidance(tables: dict[str, dict]) -> str:
  """Returns the title of the guidance weight with the most correct images.

  In a tie, it is the first title. `tables` is the entry "tables" of the result of `evaluate`.
  """
  weights = [title for title in tables if title not in (REAL, RECONSTRUCTED)]
  return max(weights, key=lambda title: tables[title]["all"]["correct"]["share"])


def describe(result: dict) -> str:
  """Formats the result of `evaluate` as text."""
  lines = [scene_table.describe(result["tables"])]
  if gain := result.get("gain"):
    lines.append(f"{gain['title']} minus {UNGUIDED}: {intervals.describe_share(gain)} correct")
  if bundled := result.get("bundled"):
    right = ", ".join(f"{title} {count}" for title, count in bundled["right"].items())
    lines.append(f"correct of the {bundled['images']} images on the sheet: {right}")
  judge = errors.describe(result["judge"])
  return "\n".join([*lines, f"judge, on real images: {judge}"])


def overview(result: dict) -> dict:
  """Returns the main shares of a result of `evaluate`, for the summary of the stage.

  Returns:
    A dict with these entries. Entries that do not apply to the captions are absent.

    - "judge": main shares of `errors.measure`.
    - Each title of `result["tables"]`: the shares over all images of the table.
    - "best": shares at the best guidance weight, with their confidence intervals. "title" is the
      title of the weight. "correct", "color", "count" and "place" are shares of all images. "scene"
      (a reason for holding out), "new_claims" (captions whose claims no training caption makes) and
      "single_object" (a category) are the shares of correct images among these images. "lookup":
      {"scene", "new_claims": share of these captions for which a training image is correct}.
    - "gain", "bundled": as in `result`.
  """
  tables = result["tables"]
  shares = {
    title: {
      **{m: table["all"][m]["share"] for m in scene_table.MEASURES if m in table["all"]},
      "geneval": table["geneval"],
    }
    for title, table in tables.items()
  }
  judge = {name: result["judge"][name] for name in ("real", "changed_right")}
  title = best_guidance(tables)
  best = tables[title]
  parts = {
    "scene": best["heldout"].get("scene"),
    "new_claims": best["parts"].get(scene_table.NEW_CLAIMS),
    "single_object": best["tag"].get("single_object"),
  }
  found = {
    name: parts[name][scene_table.LOOKUP]["share"]
    for name in ("scene", "new_claims")
    if parts[name]
  }
  main = {
    "title": title,
    **{m: best["all"][m] for m in ("correct", "color", "count", "place") if m in best["all"]},
    **{name: row["correct"] for name, row in parts.items() if row},
    "lookup": found,
  }
  more = {name: result[name] for name in ("gain", "bundled") if name in result}
  return {"judge": judge, **shares, "best": main, **more}

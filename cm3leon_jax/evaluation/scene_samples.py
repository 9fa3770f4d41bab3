"""Generates images for held-out captions of `scenes`, judges them, and writes the results."""

# n scenes, H height, W width.

from collections.abc import Sequence
import dataclasses
import json

from etils import epath
import numpy as np
from PIL import Image

from cm3leon_jax.config import UserError
from cm3leon_jax.data import scene_drawings
from cm3leon_jax.data.documents import DocumentStore
from cm3leon_jax.data.scene_world import Placed, Scene
from cm3leon_jax.evaluation import judge_errors, scene_table, scenes
from cm3leon_jax.evaluation.scene_table import Judged
from cm3leon_jax.generation.heldout import HeldoutCaption, tasks_of_rows
from cm3leon_jax.generation.pipeline import Pipeline, Sample
from cm3leon_jax.generation.writer import contact_sheet, save_png
from cm3leon_jax.io import replacing, write_json

REAL, RECONSTRUCTED = "real images", "reconstructions"  # Titles of what limits the samples.
SHEET_SCENES = 16
FRAME = 3  # Width of the frame of a sample, in pixels of the image.
RIGHT, WRONG, PLAIN = (30, 160, 60), (210, 40, 40), (255, 255, 255)  # Colors of the frame.


def real_image(facts: dict) -> np.ndarray:
  """Renders the image that the facts of a document describe: [H, W, 3] uint8."""
  placed = [Placed(thing["class"], thing["color"], thing["place"]) for thing in facts["objects"]]
  return scene_drawings.render(Scene.of(placed))


def choose(facts: Sequence[dict], count: int, seed: int) -> list[int]:
  """Chooses scenes, equally many of each category and kind of held-out as far as there are enough.

  Args:
    facts: field `facts` of every held-out document; {} without facts.
    count: number of scenes.
    seed: of the choice.

  Returns:
    `count` indices into `facts`; any first ones are spread in the same way.

  Raises:
    UserError: fewer documents have facts.
  """
  rng, groups = np.random.default_rng([seed, len(facts)]), {}
  for i in rng.permutation(len(facts)):
    if facts[i]:
      groups.setdefault((facts[i]["tag"], facts[i]["heldout"]), []).append(int(i))
  available = sum(map(len, groups.values()))
  if available < count:
    raise UserError(
      f"{count} held-out scenes are to be chosen, and {available} held-out documents have facts: "
      "lower config.evaluation.scenes, or prepare data with config.raw.source = 'scenes'."
    )
  ordered = [groups[key] for key in sorted(groups)]
  rounds = [[group[i] for group in ordered if i < len(group)] for i in range(count)]
  return [i for one_round in rounds for i in one_round][:count]


def heldout_scenes(
  pipeline: Pipeline, workdir: epath.PathLike, weights: Sequence[float]
) -> list[HeldoutCaption]:
  """Returns tasks of held-out captions that have facts, guidance weight after guidance weight.

  `evaluation.scenes` captions are chosen by the seed (`choose`), all if it is 0.

  Args:
    pipeline: of the run; the evaluation, sampling and seed of its settings are used.
    workdir: of the run; its document stores and neighbors are read.
    weights: of guidance; equal ones count once.

  Raises:
    UserError: too few held-out documents have facts.
  """
  store = DocumentStore(epath.Path(workdir) / "documents" / "heldout_pairs", pipeline.layout.vocab)
  facts = [store[i].facts for i in range(len(store))]
  settings, tokenizer = pipeline.settings, pipeline.image_tokenizer
  config, seed = settings.evaluation, settings.seed
  rows = choose(facts, config.scenes or max(1, sum(map(bool, facts))), seed)
  columns = [
    (config.scene_neighbors, dataclasses.replace(settings.sampling, guidance=weight))
    for weight in dict.fromkeys(weights)
  ]
  return tasks_of_rows(pipeline.layout, workdir, rows, seed, columns, image_tokenizer=tokenizer)


def evaluate(
  pipeline: Pipeline, tasks: Sequence[HeldoutCaption], folder: epath.PathLike
) -> dict[str, dict]:
  """Generates and judges images; writes them, scenes.json, scenes_results.jsonl and scenes.png.

  The real images and their reconstructions by the image tokenizer are judged, too: no sample can
  be expected to be judged better than those. A real image is drawn from its facts.

  Args:
    pipeline: of the run.
    tasks: result of `heldout_scenes`.
    folder: gets the files.

  Returns:
    {"judge": result of `judge_errors.measure`, "tables": {"real images", "reconstructions", and for
    each weight e.g. "guidance 1.5": result of `scene_table.table`}}.
  """
  folder, seed = epath.Path(folder), pipeline.settings.seed
  samples = [of_task[0] for of_task in pipeline.generate(tasks, show_progress=True)]
  by_weight: dict[str, list[Sample]] = {}
  for sample in samples:
    by_weight.setdefault(f"guidance {sample.task.sampling.guidance:g}", []).append(sample)
  first = [sample.task for sample in next(iter(by_weight.values()))]
  facts = [task.document.facts for task in first]
  real = np.stack([real_image(fact) for fact in facts])
  columns = {
    REAL: real,
    RECONSTRUCTED: np.stack([task.original for task in first]),
    **{title: np.stack([s.segments[0] for s in some]) for title, some in by_weight.items()},
  }
  judged = {
    title: [
      Judged(task.prompt, fact, task.concept, verdict)
      for task, fact, verdict in zip(first, facts, scenes.judge_all(images, facts))
    ]
    for title, images in columns.items()
  }
  resamples = pipeline.settings.evaluation.num_resamples
  result = {
    "judge": judge_errors.measure(real, facts, seed),
    "tables": {title: scene_table.table(some, resamples, seed) for title, some in judged.items()},
  }
  _write_results(folder, samples, [one for title in by_weight for one in judged[title]])
  save_png(folder / "scenes.png", sheet(columns, judged))
  write_json(folder / "scenes.json", result)
  return result


def metadata(task: HeldoutCaption) -> dict:
  """Returns what GenEval checks of an image for the task."""
  return scene_table.geneval_metadata(task.prompt, task.document.facts)


def _write_results(folder: epath.Path, samples: Sequence[Sample], judged: Sequence[Judged]) -> None:
  """Writes the images of all samples, and a line of GenEval's results for each."""
  lines = []
  for sample, one in zip(samples, judged):
    name = f"scenes/{sample.task.file_stem}.png"
    save_png(folder / name, sample.segments[0])
    weight = {"guidance": sample.task.sampling.guidance}
    lines.append(json.dumps({**scene_table.geneval_result(name, one), **weight}) + "\n")
  with replacing(folder / "scenes_results.jsonl", "w") as file:
    file.write("".join(lines))


def sheet(columns: dict[str, np.ndarray], judged: dict[str, list[Judged]]) -> Image.Image:
  """Lays out the first scenes: caption, then an image of each column, green if right, else red.

  Args:
    columns: title -> [n, H, W, 3] uint8; the first are the real images, which get no color.
    judged: title -> n images and their verdicts.
  """
  titles, rows = [title for title in columns if title != RECONSTRUCTED], []
  side = columns[titles[-1]].shape[1]
  captions = [one.prompt for one in judged[titles[0]]][:SHEET_SCENES]
  for i in range(len(captions)):
    row = []
    for title in titles:
      color = RIGHT if judged[title][i].verdict.correct else WRONG
      row.append(framed(columns[title][i], side, PLAIN if title == REAL else color))
    rows.append(row)
  return contact_sheet(rows, captions, titles)


def framed(image: np.ndarray, side: int, color: tuple[int, int, int]) -> np.ndarray:
  """Scales an image to `side` x `side` pixels and frames it: [H, W, 3] uint8 for each."""
  scaled = np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST))
  result = np.full((side + 2 * FRAME, side + 2 * FRAME, 3), color, np.uint8)
  result[FRAME:-FRAME, FRAME:-FRAME] = scaled
  return result


def describe(result: dict) -> str:
  """Writes the result of `evaluate` as text."""
  judge = judge_errors.describe(result["judge"])
  return f"{scene_table.describe(result['tables'])}\njudge, on real images: {judge}"


def overview(result: dict) -> dict:
  """Returns the main shares of a result of `evaluate`, for the summary of the stage."""
  shares = {
    title: {
      **{m: table["all"][m]["share"] for m in scene_table.MEASURES if m in table["all"]},
      "geneval": table["geneval"],
    }
    for title, table in result["tables"].items()
  }
  judge = {name: result["judge"][name] for name in ("real", "changed_right")}
  return {"judge": judge, **shares}

"""Counts correct images of scenes a second time, without the judge.

  python -m benchmarks.evidence.scene_recount --card=workdir/scene_card
  python -m benchmarks.evidence.scene_recount --run=workdir/scenes
  python -m benchmarks.evidence.scene_recount --edits=scenes-instruct

`--card` reads the images of `scene_card`, `--run` those of the stage `evaluate`.
`--edits` names a tuned run or bundle, which edits 200 held-out scenes for each kind of edit. Each
quarter of an image is compared with the true drawings of all objects in all colors and with a blank
quarter; the nearest one, by the squared differences of pixels, says what the quarter shows. The
image is correct if these objects can be assigned to the clauses of its caption. Prints, for each
set of captions, the share that the judge called correct, the share of this count, and the
numbers of images that only one of both accepts.
"""

from collections import defaultdict
from collections.abc import Sequence
import dataclasses
import functools
import itertools
import json
import pathlib

from absl import app, flags
import jax
import numpy as np
from PIL import Image

from cm3leon_jax.config.instructions import is_edit
from cm3leon_jax.data.instructions.task_files import load_tasks
from cm3leon_jax.errors import UserError
from cm3leon_jax.files.json_files import read_json, read_json_lines
from cm3leon_jax.generation.pipeline import Pipeline
from cm3leon_jax.mesh import create_mesh
from cm3leon_jax.run.run import Run
from examples.scenes import config as demo
from examples.scenes import instruct, world
from examples.scenes.drawings import render
from examples.scenes.judge import grades as answers
from examples.scenes.options import ScenesConfig
from examples.scenes.world import Placed, Scene

CELL = 24  # Pixels per side of a quarter.
EDITS = 200  # Number of held-out records per kind of edit.
CHUNK = 256  # Number of images that are compared at a time.
CORNERS = {"top left": (0, 0), "top right": (0, 1), "bottom left": (1, 0), "bottom right": (1, 1)}
RELATIONS = {
  "left of": lambda a, b: a[1] < b[1],
  "right of": lambda a, b: a[1] > b[1],
  "above": lambda a, b: a[0] < b[0],
  "below": lambda a, b: a[0] > b[0],
}
Shown = tuple[str, str, str]  # Name, color and place of an object.


@functools.cache
def _drawings() -> tuple[list[tuple[str, str] | None], np.ndarray, np.ndarray]:
  """Returns the names of all drawings, their pixels, [n, values], and the squares' sums, [n]."""
  config = ScenesConfig(rare_objects=1_550)
  objects = (*config.objects, *world.rare_objects(config))
  names = [(name, color) for name in objects for color in config.colors]
  cells = [render(Scene((Placed(*name, "top left"),)))[:CELL, :CELL] for name in names]
  pixels = np.stack([*cells, np.full_like(cells[0], 255)]).reshape(len(names) + 1, -1)
  pixels = pixels.astype(np.float32) / 255
  return [*names, None], pixels, (pixels**2).sum(1)


def objects_of(images: np.ndarray) -> list[list[Shown]]:
  """Returns what the four quarters of each image, [n, 48, 48, 3] uint8, show."""
  names, pixels, squares = _drawings()
  shown: list[list[Shown]] = [[] for _ in images]
  for place, (row, column) in CORNERS.items():
    cells = images[:, row * CELL :, column * CELL :][:, :CELL, :CELL].reshape(len(images), -1)
    for start in range(0, len(images), CHUNK):
      distances = squares - 2 * (cells[start : start + CHUNK].astype(np.float32) / 255) @ pixels.T
      for i, nearest in enumerate(distances.argmin(1), start):
        if (name := names[int(nearest)]) is not None:
          shown[i].append((*name, place))
  return shown


def is_correct(shown: Sequence[Shown], clauses: Sequence[dict]) -> bool:
  """Says whether the objects can be assigned to the clauses of a caption, with none left over."""
  ends = np.cumsum([clause["count"] for clause in clauses])
  if len(shown) != ends[-1]:
    return False
  groups = (
    [order[end - clause["count"] : end] for clause, end in zip(clauses, ends)]
    for order in itertools.permutations(shown)
  )
  return any(_fits(of, clauses) for of in groups)


def _fits(groups: Sequence[Sequence[Shown]], clauses: Sequence[dict]) -> bool:
  for group, clause in zip(groups, clauses):
    for name, color, place in group:
      facts = {"class": name, "color": color, "place": place}
      if any(clause.get(key, value) != value for key, value in facts.items()):
        return False
      if "position" in clause:
        relation, other = clause["position"]
        holds = RELATIONS[relation]
        if not all(holds(CORNERS[place], CORNERS[there]) for _, _, there in groups[other]):
          return False
  return True


def _of_card(name: str) -> list[tuple[str, list[dict], bool, np.ndarray]]:
  """Returns set, clauses, verdict and image of each sample of `scene_card`."""
  folder = pathlib.Path(name)
  rows = read_json(folder / "verdicts.json")
  images = np.load(folder / "samples.npz")["images"]
  if len(rows) != len(images):
    raise UserError(f"{folder} has {len(rows)} verdicts and {len(images)} images; measure again.")
  return [(row["group"], row["facts"]["include"], row["right"], x) for row, x in zip(rows, images)]


def _of_run(name: str) -> list[tuple[str, list[dict], bool, np.ndarray]]:
  """Returns guidance weight, clauses, verdict and image of each judged sample of a run."""
  scenes, own = demo.scenes_of(Run.open(name).settings), ScenesConfig()
  if (scenes.style, scenes.colors) != (own.style, own.colors):
    raise UserError(f"{name} has scenes of another style or other colors than the drawings here.")
  folder = pathlib.Path(name) / "evaluation"
  return [
    (
      row["title"],
      json.loads(row["metadata"])["include"],
      row["correct"],
      np.asarray(Image.open(folder / row["filename"]).convert("RGB")),
    )
    for row in read_json_lines(folder / "scenes_results.jsonl")
  ]


def _of_edits(name: str) -> list[tuple[str, list[dict], bool, np.ndarray]]:
  """Returns kind, clauses, verdict and image of edits, made as in `examples.scenes.grade`.

  The run must know its tasks as files: `examples.scenes.make_instructions` writes them.
  """
  run = Run.open(name)
  samples = []
  with jax.set_mesh(create_mesh(run.settings.mesh)):
    pipeline = Pipeline.load(run, run.params()[0], None, batch_size=EDITS)
    instructions = dataclasses.replace(run.settings.instructions, tasks=instruct.TASKS)
    run = dataclasses.replace(
      run, settings=dataclasses.replace(run.settings, instructions=instructions)
    )
    for task in load_tasks(instructions):
      if is_edit(task.templates[0]):
        records = answers.heldout_records(task, run.settings, EDITS)
        for answer in answers.answer_all(pipeline, task, records):
          clauses = answer.record.facts["include"]
          samples.append((task.name, clauses, answer.right, np.asarray(answer.answer)))
  return samples


READERS = {"card": _of_card, "run": _of_run, "edits": _of_edits}


def count(kind: str, name: str) -> str:
  """Returns the table of both counts. `kind` and `name` are a flag and its value."""
  samples = READERS[kind](name)
  if not samples:
    raise UserError(f"{name} has no judged samples, see --help.")
  counts = defaultdict(list)
  shown = objects_of(np.stack([image for *_, image in samples]))
  for (name, clauses, right, _), objects in zip(samples, shown):
    counts[name].append((right, is_correct(objects, clauses)))
  lines = [
    "| captions | judge | nearest drawings | judge alone | nearest alone |",
    f"|{'---|' * 5}",
  ]
  for name, pairs in counts.items():
    judge, nearest = np.array(pairs, bool).T
    alone = f"{np.sum(judge & ~nearest)} | {np.sum(nearest & ~judge)}"
    lines.append(f"| {name} ({len(pairs)}) | {judge.mean():.1%} | {nearest.mean():.1%} | {alone} |")
  return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
  given = {kind: flags.FLAGS[kind].value for kind in READERS if flags.FLAGS[kind].value}
  if len(argv) > 1 or len(given) != 1:
    raise UserError("give one of --card, --run and --edits, see --help.")
  print(count(*given.popitem()))


if __name__ == "__main__":
  flags.DEFINE_string("card", "", "Workdir of benchmarks.evidence.scene_card.")
  flags.DEFINE_string("run", "", "Workdir of a run whose stage `evaluate` is finished.")
  flags.DEFINE_string("edits", "", "Run or bundle that is tuned on edits of scenes.")
  app.run(main)

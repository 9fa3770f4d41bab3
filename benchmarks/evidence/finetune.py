"""Compares tunings of a base on a user's drawings: what is learned, and what is forgotten.

  python -m benchmarks.evidence.finetune make --folder=drawings
  python -m benchmarks.evidence.finetune compare --folder=drawings --workdir=workdir/finetune

`make` draws 240 pictures of one flat shape each, in the colors of `scenes`: 4 shapes, 8 colors, 4
places. A quarter of the 128 combinations is never drawn. `compare` tunes the bundled model `scenes`
once for each share of replay and each learning rate, generates an image for each combination that
was not drawn, and prints a table. An image is correct if, of the pictures of all combinations, the
one that its caption describes is the nearest. An interrupted comparison continues.
"""

import functools
import itertools
import json
import pathlib
import random

from absl import app, flags
import numpy as np
from PIL import Image, ImageDraw

from benchmarks.evidence.own_images import nearest_caption, polygon
from cm3leon_jax import finetune
from cm3leon_jax.api import CM3Leon
from cm3leon_jax.errors import UserError
from cm3leon_jax.evaluation.intervals import mean_interval
from cm3leon_jax.files.json_files import read_json
from examples.scenes.options import COLORS

DRAWINGS, DRAWN = 240, 96  # Numbers of drawings and of combinations that are drawn.
SIDE, FINE = 48, 4  # Pixels; factor by which a drawing is larger before it is reduced.
SHAPES = ("disc", "square", "triangle", "star")
PLACES = {"top left": (12, 12), "top right": (36, 12), "bottom left": (12, 36)}
PLACES |= {"bottom right": (36, 36)}
Fact = tuple[str, str, str]  # Shape, color, place.
ALL: list[Fact] = list(itertools.product(SHAPES, COLORS, PLACES))


def caption(fact: Fact) -> str:
  shape, color, place = fact
  return f"a {color} {shape} at the {place}"


def draw(fact: Fact, radius: float = 9.5, shift: tuple[float, float] = (0.0, 0.0)) -> Image.Image:
  """Draws a fact. `radius` and `shift` are in pixels."""
  shape, color, place = fact
  x, y = (c + s for c, s in zip(PLACES[place], shift))
  corners = [(FINE * a, FINE * b) for a, b in polygon(shape, x, y, radius)]
  image = Image.new("RGB", (FINE * SIDE, FINE * SIDE), "white")
  ImageDraw.Draw(image).polygon(corners, fill=COLORS[color])
  return image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def facts(seed: int = 0) -> tuple[list[Fact], list[Fact]]:
  """Returns the combinations that are drawn, and those that are not."""
  order = random.Random(seed).sample(ALL, len(ALL))
  return order[:DRAWN], order[DRAWN:]


def drawings(seed: int = 0) -> list[tuple[Fact, Image.Image]]:
  """Returns all drawings, which vary in size and position."""
  rng, drawn = np.random.default_rng(seed), facts(seed)[0]
  made = [drawn[i % len(drawn)] for i in range(DRAWINGS)]
  return [(f, draw(f, rng.uniform(8.5, 10.5), tuple(rng.uniform(-1.5, 1.5, 2)))) for f in made]


def make(folder: pathlib.Path) -> None:
  """Writes the drawings with one caption file each."""
  folder.mkdir(parents=True, exist_ok=True)
  for number, (fact, image) in enumerate(drawings()):
    image.save(folder / f"{number:03}.png")
    (folder / f"{number:03}.txt").write_text(caption(fact))
  print(f"make: {DRAWINGS} drawings in {folder}.")


@functools.cache
def pictures() -> np.ndarray:
  """Returns the pictures of all combinations, [128, H, W, 3] fp32."""
  return np.stack([np.asarray(draw(fact), np.float32) for fact in ALL])


def seen(image: Image.Image) -> Fact:
  """Returns the combination whose picture is the nearest to an image."""
  pixels = np.asarray(image.convert("RGB").resize((SIDE, SIDE)), np.float32)
  return ALL[int(((pictures() - pixels) ** 2).sum((1, 2, 3)).argmin())]


def correct(images: list[Image.Image], asked: list[Fact]) -> list[bool]:
  return [seen(image) == fact for image, fact in zip(images, asked)]


def tune(folder: pathlib.Path, workdir: pathlib.Path, replay: str, rate: str) -> dict:
  """Tunes the bundled model and judges it. Returns the numbers of a row."""
  fields = {"data.base_share": replay, "optimizer.learning_rate": rate}
  finetune.run(
    str(folder), workdir, "scenes", minutes=flags.FLAGS.minutes, fields=fields, show_progress=False
  )
  model = CM3Leon.load(workdir)
  forgotten = read_json(workdir / "forgetting" / "done.json", {"summary": dict})["summary"]
  right = {f"right_{n}": generated(model, n) for n in (0, 1)}
  return {**right, "steps": model.step, **forgotten}


def generated(model: CM3Leon, retrieve: int) -> list[bool]:
  """Returns whether the images for the combinations that were not drawn are correct."""
  asked = facts()[1]
  made = model.generate([caption(f) for f in asked], seed=0, retrieve=retrieve)
  return correct([samples[0].image for samples in made], asked)


def share(right: list[bool]) -> str:
  mean = mean_interval(right, np.ones(len(right)), range(len(right)))
  return f"{mean['mean']:.0%} [{100 * mean['low']:.0f}, {100 * mean['high']:.0f}]"


def row(name: str, found: dict) -> str:
  """Formats a row of the table."""
  judged = found["correct"]
  image, text = (f"{x['before']:.3f} -> {x['after']:.3f}" for x in (found["image"], found["text"]))
  change, low, high = (round(100 * judged[name]) for name in ("change", "low", "high"))
  return (
    f"| {name} | {found['steps']} | {share(found['right_0'])} | {share(found['right_1'])} | "
    f"{image} | {text} | {judged['before']:.0%} -> {judged['after']:.0%}: {change:+} points "
    f"[{low:+}, {high:+}] |"
  )


def compare(folder: pathlib.Path, workdir: pathlib.Path) -> None:
  """Tunes once per share and rate, and prints the table."""
  if not (folder / "000.txt").exists():
    raise UserError(f"{folder} has no drawings: run `finetune make` first.")
  drawn, asked = facts()
  captions = [caption(f) for f in drawn]
  looked_up = [draw(drawn[nearest_caption(caption(f), captions)]) for f in asked]
  before = generated(CM3Leon.load("scenes"), 0)
  print(f"new captions: {len(asked)}; correct by lookup {np.mean(correct(looked_up, asked)):.0%}, "
        f"by the base {np.mean(before):.0%}")  # fmt: skip
  titles = ("replay, rate", "steps", "new captions correct, no neighbor", "one neighbor")
  titles += ("bits per image code of the base", "bits per text token")
  titles += ("correct images for the base's captions",)
  print(f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
  for replay, rate in itertools.product(flags.FLAGS.shares, flags.FLAGS.rates):
    name = f"share_{replay}_rate_{rate}_minutes_{flags.FLAGS.minutes:g}"
    stored = workdir / f"{name}.json"
    if not stored.exists():
      found = tune(folder, workdir / name, replay, rate)
      stored.write_text(json.dumps(found))
    print(row(f"{replay}, {rate}", read_json(stored, {})), flush=True)


def main(argv: list[str]) -> None:
  folder, workdir = (pathlib.Path(name) for name in (flags.FLAGS.folder, flags.FLAGS.workdir))
  if argv[1:] == ["make"]:
    make(folder)
  elif argv[1:] == ["compare"]:
    compare(folder, workdir)
  else:
    raise app.UsageError("name make or compare.")


if __name__ == "__main__":
  flags.DEFINE_string("folder", "drawings", "Folder of the drawings.")
  flags.DEFINE_string("workdir", "workdir/finetune", "Folder of the workdirs.")
  flags.DEFINE_list("shares", ["0.1", "0.01", "0"], "Shares of replay.")
  flags.DEFINE_list("rates", ["6.67e-4"], "Learning rates; a tuning of `scenes` has 6.67e-4.")
  flags.DEFINE_float("minutes", 10.0, "Minutes on two cores per tuning.")
  app.run(main)

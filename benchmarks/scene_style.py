"""Measures whether samples of a decoder take on the style of a bank that training never saw.

  python -m benchmarks.scene_style --run=workdir/scenes --workdir=workdir/scene_style

Writes a second bank with outlined icons, using the tokenizers and the CLIP model of the run. Then
the decoder of the run generates two images per caption: one after a neighbor from its usual bank,
and one after a neighbor from the second bank. Nothing is trained, and no caption names a style.
Writes results.json, table.md and samples.png to the workdir. --run=A,B measures several runs with
the same tokenizers. docs/retrieval_ablation.md describes the method.
"""

import collections
from collections.abc import Iterator
import dataclasses
import os
import pathlib
import random
import sys

from absl import app, flags, logging
import jax
import numpy as np

from benchmarks import experiment as experiment_lib
from benchmarks import scene_style_table as table
from cm3leon_jax.checkpoints import reading
from cm3leon_jax.config import UserError
from cm3leon_jax.configs import scenes as config_scenes
from cm3leon_jax.data.documents.store import DocumentStore
from cm3leon_jax.data.sources import splits
from cm3leon_jax.generation.image_tasks import TextToImage
from cm3leon_jax.generation.pipeline import Pipeline
from cm3leon_jax.generation.sample import Sample
from cm3leon_jax.generation.writer import contact_sheet, save_png
from cm3leon_jax.mesh import create_mesh
from cm3leon_jax.retrieval.bank import load_clip
from cm3leon_jax.runs import stages
from cm3leon_jax.runs import table as stage_table
from cm3leon_jax.scenes import world
from cm3leon_jax.scenes.captions import describe
from cm3leon_jax.scenes.config import COMMON, ScenesConfig
from cm3leon_jax.scenes.drawings import ink, render
from cm3leon_jax.scenes.judge import judge
from cm3leon_jax.scenes.world import ICONS, PLACES, Placed, Scene
from cm3leon_jax.settings import Settings, settings_from_config, settings_of_run
from cm3leon_jax.tokenizers.vqgan import ImageTokenizer
from cm3leon_jax.trained.run import Run

# n captions, H height, W width, I codes per image.

USUAL, OTHER = "filled", "outlined"
STYLES = (USUAL, OTHER)  # Styles of the two banks.
NEITHER = "neither"
GROUPS = {
  "unseen": "rare, never trained",
  "once": "rare, in one training scene",
  "common": "common, in another combination",
}
# Thin icons look alike in both styles and are excluded. With a limit of 0.7, the classifier is
# correct on 99% of reconstructions.
MOST_KEPT = 0.7  # Maximum ink of an outlined icon, relative to the filled icon.
LEAST_INK = 0.25  # Minimum ink of an image, relative to the outlined drawing.
SHOWN = 16  # Number of captions in samples.png.


@dataclasses.dataclass(frozen=True)
class Asked:
  """Caption, and the one object that the caption describes."""

  group: str
  placed: Placed
  caption: str


def is_clear(name: str) -> bool:
  """Returns whether an object looks different in the two styles."""
  filled, outlined = (ink(ICONS[name], style).sum(dtype=np.int64) for style in STYLES)
  return bool(outlined <= MOST_KEPT * filled)


def unseen(config: ScenesConfig) -> Iterator[Placed]:
  """Yields each rare object that training never shows, in a color that the bank never shows."""
  for name in world.rare_objects(config):
    if world.is_heldout_rare(name) and world.rare_color(name) in config.colors:
      yield Placed(name, world.rare_color(name), world.rare_place(name))


def once(config: ScenesConfig, trained: collections.Counter) -> Iterator[Placed]:
  """Yields each rare object of exactly one training scene, in a color that was never shown.

  Args:
    config: configuration of the world.
    trained: object -> number of training scenes that show it.
  """
  shown = collections.defaultdict(set)
  for scene in world.bank_scenes(config)[: config.bank]:
    for placed in scene.objects:
      shown[placed.object].add(placed.color)
  for name in world.rare_objects(config):
    colors = [c for c in config.colors if c not in {*shown[name], world.rare_color(name)}]
    if trained[name] == 1 and colors:
      color = min(colors, key=lambda c: splits.fraction(f"style/{name}/{c}"))
      yield Placed(name, color, world.rare_place(name))


def common(config: ScenesConfig) -> Iterator[Placed]:
  """Yields the object of each held-out scene that shows only one common object."""
  for name in config.objects:
    for color in config.colors:
      for place in PLACES:
        placed = Placed(name, color, place)
        if world.split_of_scene(Scene((placed,))) == "scene":
          yield placed


def ask(config: ScenesConfig, trained: collections.Counter, most: int) -> list[Asked]:
  """Selects up to `most` objects per group, and writes a caption for each.

  Raises:
    UserError: no object can be selected.
  """
  rng, asked = random.Random(0), []
  found = {"unseen": unseen(config), "once": once(config, trained), "common": common(config)}
  for group, scenes_of in found.items():
    placed = [p for p in scenes_of if is_clear(p.object)]
    for one in rng.sample(placed, min(most, len(placed))):
      category = "colors" if one.object in COMMON else "rare"
      asked.append(Asked(group, one, describe(category, Scene((one,)), rng).caption))
  if not asked:
    raise UserError("config.scenes of the run has no object that looks different when outlined.")
  return asked


def draw(asked: list[Asked], style: str) -> np.ndarray:
  """Renders the objects that captions describe: [n, H, W, 3] uint8."""
  return np.stack([render(Scene((one.placed,)), style) for one in asked])


def classify(images: np.ndarray, asked: list[Asked]) -> list[str]:
  """Returns, for each image, the style whose drawing of the object has the smaller squared error.

  Only the place with the most ink is compared, regardless of color. The result is `NEITHER` for an
  image with almost no ink.

  Args:
    images: [n, H, W, 3] uint8.
    asked: captions with the requested objects.
  """
  names = []
  for opacity, one in zip(judge.opacities(images), asked):
    cell = max(opacity, key=np.sum)
    drawn = {style: ink(ICONS[one.placed.object], style) / 255 for style in STYLES}
    nearest = min(STYLES, key=lambda style: ((cell - drawn[style]) ** 2).sum())
    names.append(nearest if cell.sum() >= LEAST_INK * drawn[OTHER].sum() else NEITHER)
  return names


def recognized(images: np.ndarray, asked: list[Asked], style: str) -> list[bool]:
  """Returns, for each image, whether it fits the requested object best of all `style` drawings."""
  found = judge.find_objects(images, style, min_score=0)
  return [
    any((x.name, x.place) == (one.placed.object, one.placed.place) for x in objects)
    for objects, one in zip(found, asked)
  ]


def colored(images: np.ndarray, asked: list[Asked]) -> list[bool]:
  """Returns, for each image, whether it shows only one object, in the requested place and color."""
  return [
    [(x.place, x.color) for x in objects] == [(one.placed.place, one.placed.color)]
    for objects, one in zip(judge.find_objects(images), asked)
  ]


def check_classifier(tokenizer: ImageTokenizer, asked: list[Asked]) -> dict:
  """Measures the classifier on drawings that the image tokenizer has reconstructed."""
  result: dict = {}
  for style in STYLES:
    images = tokenizer.decode(tokenizer.encode(draw(asked, style)))
    result[style] = {
      "right": [name == style for name in classify(images, asked)],
      "recognized": recognized(images, asked, style),
      "color": colored(images, asked),
    }
  return result


def cells_of(codes: np.ndarray) -> np.ndarray:
  """Splits the codes [n, I] of images by the four places in a scene: [n, 4, I / 4]."""
  side = round(codes.shape[1] ** 0.5)
  cells = codes.reshape(len(codes), 2, side // 2, 2, side // 2).swapaxes(2, 3)
  return cells.reshape(len(codes), len(PLACES), -1)


def known(codes: np.ndarray, trained: np.ndarray) -> dict[str, float]:
  """Computes the shares of codes and of drawings that also occur in training images.

  A drawing is all codes of one of the four places. The most frequent code is the background, which
  is not counted.

  Args:
    codes: [n, I] codes of images.
    trained: [N, I] codes of the training images.
  """
  background = np.bincount(codes.ravel()).argmax()
  seen = {cell.tobytes() for image in cells_of(trained) for cell in image}
  drawn = [c for image in cells_of(codes) for c in image if (c != background).any()]
  used = codes[codes != background]
  return {
    "codes": float(np.isin(used, trained).mean()),
    "drawings": float(np.mean([cell.tobytes() in seen for cell in drawn])),
  }


def overrides_of(settings: Settings) -> dict:
  """Returns the config fields of a run that differ from the config `scenes`."""
  usual = settings_from_config(config_scenes.get_config())
  fields = {} if settings.seed == usual.seed else {"seed": settings.seed}
  for section in dataclasses.fields(Settings)[1:]:
    own, other = getattr(settings, section.name), getattr(usual, section.name)
    for name, value in dataclasses.asdict(own).items():
      if value != getattr(other, name):
        fields[f"{section.name}.{name}"] = value
  return fields


def prepare_bank(settings: Settings, run: pathlib.Path, bank: pathlib.Path) -> None:
  """Writes the outlined bank with a run's tokenizers and CLIP model, unless it is complete.

  Raises:
    UserError: `bank` was made with another run.
  """
  bank.mkdir(parents=True, exist_ok=True)
  for name in (*stage_table.TOKENIZERS, *stage_table.own_clip(settings)):
    if not (bank / name).exists():
      (bank / name).symlink_to(os.path.relpath(run / name, bank))
    if stages.require(bank, name)["id"] != stages.require(run, name)["id"]:
      raise UserError(f"{bank} was made with another {name} than {run}: use another --workdir.")
  overrides = {**overrides_of(settings), "scenes.style": OTHER}
  for name in ("raw", "documents", "neighbors"):
    command = stage_table.STAGES[name].command
    experiment_lib.run_stage(command, "ml_configs/scenes.py", bank, overrides)


def generate(settings: Settings, run: pathlib.Path, banks: dict, asked: list[Asked]) -> dict:
  """Generates an image for each caption after its best neighbor in each bank.

  Args:
    settings: settings of the run.
    run: workdir of the run.
    banks: style -> workdir of the bank.
    asked: captions of the images.

  Returns:
    Style of the bank -> n samples, one per caption.
  """
  tasks = [
    TextToImage(one.caption, retrieve=1, seed=settings.seed + i, sampling=settings.sampling, row=i)
    for i, one in enumerate(asked)
  ]
  samples: dict[str, list[Sample]] = {}
  with jax.set_mesh(create_mesh(settings.mesh)):
    params, _ = reading.load_params(run / "train", settings.model)
    clip = load_clip(settings.retrieval.clip, run, settings.vocab)
    size = settings.evaluation.batch_size
    for style, bank in banks.items():
      pipeline = Pipeline.load(Run(run, settings), params, clip, bank, batch_size=size)
      samples[style] = [of_task[0] for of_task in pipeline.generate(tasks, show_progress=True)]
  return samples


def measure(samples: list[Sample], asked: list[Asked], style: str) -> dict[str, list[bool]]:
  """Returns measure -> value for each sample; the neighbors are drawn in `style`."""
  images = np.stack([sample.segments[0] for sample in samples])
  named = classify(images, asked)
  return {
    OTHER: [name == OTHER for name in named],
    NEITHER: [name == NEITHER for name in named],
    "recognized": recognized(images, asked, style),
    "color": colored(images, asked),
    "neighbor": [
      any(o["class"] == one.placed.object for d in sample.neighbors for o in d.facts["objects"])
      for sample, one in zip(samples, asked)
    ],
  }


def sheet(samples: dict, asked: list[Asked], tokenizer: ImageTokenizer, settings: Settings):
  """Returns an image with a row per caption: neighbor and sample for each of the two banks."""
  with_neighbors = [
    i for i in range(len(asked)) if all(samples[style][i].neighbors for style in STYLES)
  ]
  rows = np.array(with_neighbors)[
    np.unique(np.linspace(0, len(with_neighbors) - 1, SHOWN).astype(int))
  ]
  columns = []
  for style in STYLES:
    found = [samples[style][i].neighbors[0].segments[-1].tokens for i in rows]
    columns.append(tokenizer.decode(np.stack([settings.vocab.image_codes(t) for t in found])))
    columns.append([samples[style][i].segments[0] for i in rows])
  titles = [f"{style} {what}" for style in STYLES for what in ("neighbor", "sample")]
  return contact_sheet(list(zip(*columns)), [asked[i].caption for i in rows], titles)


def open_runs(runs: list[pathlib.Path]) -> list[Settings]:
  """Returns the settings of each run.

  Raises:
    UserError: a run's tokenizers, CLIP model or bank differ from those of the first run.
  """
  read = [settings_of_run(run) for run in runs]
  names = ("raw", *stage_table.TOKENIZERS, "documents", "neighbors", *stage_table.own_clip(read[0]))
  ids = [stages.ids(settings, run, names) for settings, run in zip(read, runs)]
  for run, settings, own in zip(runs, read, ids):
    if settings.raw.source != "scenes" or settings.scenes.style != USUAL:
      raise UserError(f"--run: {run} is not a run of `scenes` with config.scenes.style={USUAL}.")
    for name in names:
      if own[name] != ids[0][name]:
        raise UserError(
          f"--run: {run} and {runs[0]} have a different {name}: measure them separately."
        )
  return read


def run_all(runs: list[pathlib.Path], workdir: pathlib.Path, most: int) -> dict:
  """Prepares the bank, generates and measures samples, and writes the results."""
  settings = open_runs(runs)
  prepare_bank(settings[0], runs[0], workdir / OTHER)
  vocab = settings[0].vocab
  store = DocumentStore(runs[0] / "documents" / "train_pairs", vocab)
  documents = [store[i] for i in range(len(store))]
  classes = [{o["class"] for o in document.facts["objects"]} for document in documents]
  trained = collections.Counter(name for names in classes for name in names)
  asked = ask(settings[0].scenes, trained, most)
  tokenizer = ImageTokenizer.load(runs[0] / "vqgan")
  codes = np.stack([vocab.image_codes(document.segments[-1].tokens) for document in documents])
  outlined = np.asarray(tokenizer.encode(draw(asked, OTHER)), codes.dtype)
  about = {
    "groups": [one.group for one in asked],
    "objects": [one.placed.object for one in asked],
    "known": known(outlined, codes),
    "classifier": check_classifier(tokenizer, asked),
  }
  measured = []
  for i, (run, own) in enumerate(zip(runs, settings)):
    samples = generate(own, run, {USUAL: run, OTHER: workdir / OTHER}, asked)
    of_bank = {style: measure(samples[style], asked, style) for style in STYLES}
    measured.append({"run": str(run), "seed": own.seed, "banks": of_bank})
    if i == 0:
      save_png(workdir / "samples.png", sheet(samples, asked, tokenizer, own))
  result = table.summarize(about, measured, GROUPS)
  experiment_lib.write_results(workdir, result, table.markdown(result))
  return result


def main(argv) -> None:
  args = flags.FLAGS
  logging.set_verbosity(logging.WARNING)
  try:
    if len(argv) > 1:
      raise UserError(f"unexpected argument '{argv[1]}': this command takes flags only.")
    if not args.run:
      raise UserError("--run must name a finished run of `scenes`: --run=workdir/scenes")
    runs = [pathlib.Path(run).resolve() for run in args.run]
    workdir = pathlib.Path(args.workdir).resolve()
    result = run_all(runs, workdir, args.captions)
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
  print(f"\n{table.markdown(result)}\nscene_style: the results are in {workdir}.")


if __name__ == "__main__":  # Tests import this module without flags.
  flags.DEFINE_list("run", None, "Workdirs of finished runs with the same tokenizers and bank.")
  flags.DEFINE_string("workdir", "workdir/scene_style", "Folder of the other bank and the results.")
  flags.DEFINE_integer("captions", 200, "Maximum number of captions per group.", lower_bound=1)
  app.run(main)

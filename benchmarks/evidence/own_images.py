"""Writes a folder of images like a user's, with one colored shape each; judges generated images.

  python -m benchmarks.evidence.own_images make --folder=my_images
  cm3leon run --config=own --config.raw.source=my_images/sidecars --workdir=workdir/own
  python -m benchmarks.evidence.own_images judge --workdir=workdir/own

`make` writes the same 290 correct pairs and ten mistakes in three formats: sidecar files, a tar and
JSONL. `judge` generates images for 50 captions that are not in the training data. It measures how
many images show the color and the shape that their caption names. It writes judged.json and
judged.png to the workdir, and puts the results at the top of report.html. docs/own_images.md is the
tutorial.
"""

import dataclasses
import functools
import io
import json
import pathlib
import random
import tarfile

from absl import app, flags
import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from cm3leon_jax.api import CM3Leon
from cm3leon_jax.data.raw import reader
from cm3leon_jax.errors import UserError
from cm3leon_jax.files.json_files import write_json
from cm3leon_jax.reports import report

# H height, W width.

SIDE = 256  # Pixels.
PAIRS = 290  # Number of correct pairs.
NEAR = 75  # Distance in RGB below which a pixel counts as having a color.
CELLS = 24  # Height and width of a mask and of a template.
AIMS = {"color": 0.6, "shape": 0.4}
COLORS = {
  "red": (214, 38, 40),
  "orange": (245, 130, 24),
  "yellow": (248, 216, 36),
  "green": (36, 158, 62),
  "blue": (36, 84, 214),
  "purple": (146, 44, 180),
}
SHAPES = ("disc", "square", "triangle", "star")
PLACES = {"left": (0.38, 0.5), "right": (0.62, 0.5), "top": (0.5, 0.38), "bottom": (0.5, 0.62)}
WORDINGS = (
  "a {color} {shape} at the {place}",
  "at the {place} there is a {shape} in {color}",
  "{place}: one {color} {shape}",
)


@dataclasses.dataclass(frozen=True)
class Fact:
  """Content of an image, and index of its caption's wording in WORDINGS."""

  color: str
  shape: str
  place: str
  wording: int

  @property
  def caption(self) -> str:
    return WORDINGS[self.wording].format(color=self.color, shape=self.shape, place=self.place)


def all_facts() -> list[Fact]:
  """Returns all 288 combinations of 6 colors, 4 shapes, 4 places and 3 wordings."""
  return [
    Fact(color, shape, place, wording)
    for color in COLORS
    for shape in SHAPES
    for place in PLACES
    for wording in range(len(WORDINGS))
  ]


def polygon(shape: str, x: float, y: float, radius: float) -> list[tuple[float, float]]:
  """Returns the corners of a shape around (x, y); a disc becomes a polygon with 64 corners."""
  count, turn = {"disc": (64, 0), "square": (4, 45), "triangle": (3, -90), "star": (10, -90)}[shape]
  angles = np.radians(np.arange(count) * 360 / count + turn)
  radii = np.where((np.arange(count) % 2 == 1) & (shape == "star"), 0.42, 1.0) * radius
  return [(float(x + r * np.cos(a)), float(y + r * np.sin(a))) for r, a in zip(radii, angles)]


def background(generator: np.random.Generator) -> Image.Image:
  """Draws a background like a blurred photo: a gradient of two pale colors, spots and noise."""
  first, second = generator.uniform(120, 225, (2, 1)) + generator.uniform(-18, 18, (2, 3))
  angle = generator.uniform(0, 2 * np.pi)
  ys, xs = np.mgrid[0:SIDE, 0:SIDE] / SIDE - 0.5
  ramp = 0.5 + 0.7 * (np.cos(angle) * xs + np.sin(angle) * ys)[..., None]
  blotches = Image.fromarray(generator.integers(0, 256, (4, 4), np.uint8)).resize((SIDE, SIDE), 3)
  light = (np.asarray(blotches, np.float32)[..., None] - 128) * 0.12
  grain = generator.normal(0, 3, (SIDE, SIDE, 1))
  pixels = first + (second - first) * ramp + light + grain
  return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def draw(fact: Fact, seed: int) -> Image.Image:
  """Draws an image of `fact`; position, size and color vary with the seed."""
  generator = np.random.default_rng(seed)
  image = background(generator)
  x, y = (SIDE * (c + generator.uniform(-0.03, 0.03)) for c in PLACES[fact.place])
  radius = SIDE * generator.uniform(0.27, 0.35)
  color = np.clip(np.array(COLORS[fact.color]) + generator.integers(-10, 11, 3), 0, 255)
  ImageDraw.Draw(image).polygon(polygon(fact.shape, x, y, radius), fill=tuple(map(int, color)))
  return image.filter(ImageFilter.GaussianBlur(0.8))


def pairs(seed: int = 0) -> list[tuple[str, Fact, Image.Image]]:
  """Returns (name, fact, image) of each correct pair."""
  choice = random.Random(seed)
  facts = [choice.choice(all_facts()) for _ in range(PAIRS)]
  return [(f"{i:03d}", fact, draw(fact, 1_000 * seed + i)) for i, fact in enumerate(facts)]


def encoded(image: Image.Image, kind: str = "jpeg") -> bytes:
  """Returns the bytes of an image file in the format `kind`."""
  file = io.BytesIO()
  image.save(file, kind, quality=92)
  return file.getvalue()


def mistakes() -> list[tuple[str, dict[str, bytes]]]:
  """Returns ten incorrect pairs, as (name, suffix -> content of the file)."""
  image = draw(Fact("red", "disc", "left", 0), 9_999)
  jpeg, png, caption = encoded(image), encoded(image, "png"), b"a red disc at the left"
  return [
    ("broken", {"jpg": jpeg[: len(jpeg) // 3], "txt": caption}),
    ("cut", {"png": png[:500], "txt": caption}),
    ("no_image", {"jpg": b"<html>404 Not Found</html>", "txt": caption}),
    ("zero", {"jpg": b"", "txt": caption}),
    ("absent_caption", {"jpg": jpeg}),
    ("another_absent", {"png": png}),
    ("empty_caption", {"jpg": jpeg, "txt": b""}),
    ("blank_caption", {"jpg": jpeg, "txt": b" \n\n"}),
    ("long_caption", {"jpg": jpeg, "txt": caption * 200}),
    ("wrong_suffix", {"jpq": jpeg, "txt": caption}),
  ]


def make(folder: pathlib.Path) -> None:
  """Writes the correct and incorrect pairs as sidecar files, as a tar, and as JSONL."""
  samples = [(n, {"jpg": encoded(i), "txt": f.caption.encode()}) for n, f, i in pairs()]
  samples = sorted([*samples, *mistakes()], key=lambda sample: sample[0])
  for name in ("sidecars", "tar", "jsonl/images"):
    (folder / name).mkdir(parents=True, exist_ok=True)
  lines = []
  with tarfile.open(folder / "tar" / "000.tar", "w") as tar:
    for name, parts in samples:
      for suffix, content in parts.items():
        (folder / "sidecars" / f"{name}.{suffix}").write_bytes(content)
        about = tarfile.TarInfo(f"{name}.{suffix}")
        about.size = len(content)
        tar.addfile(about, io.BytesIO(content))
      image, content = next((s, c) for s, c in parts.items() if s != "txt")
      (folder / "jsonl" / "images" / f"{name}.{image}").write_bytes(content)
      line = {"key": name, "image": f"images/{name}.{image}"}
      if "txt" in parts:
        line["caption"] = parts["txt"].decode()
      lines.append(json.dumps(line))
  (folder / "jsonl" / "pairs.jsonl").write_text("\n".join(lines) + "\n")
  print(f"make: {PAIRS} pairs and {len(mistakes())} mistakes in {folder}/sidecars, tar and jsonl.")


def cells(image: Image.Image, box: tuple[int, int, int, int]) -> np.ndarray:
  """Crops a box with margins of a fifth of its size; resizes it to [CELLS, CELLS] fp32."""
  left, top, right, bottom = box
  x, y = (right - left) / 5, (bottom - top) / 5
  part = image.crop((round(left - x), round(top - y), round(right + x), round(bottom + y)))
  return np.asarray(part.resize((CELLS, CELLS)), np.float32)


@functools.cache
def template(shape: str) -> np.ndarray:
  """Draws a white shape on black, and crops it with `cells`."""
  image = Image.new("L", (SIDE, SIDE))
  ImageDraw.Draw(image).polygon(polygon(shape, SIDE / 2, SIDE / 2, SIDE / 3), fill=255)
  return cells(image, image.getbbox())


def seen(image: Image.Image) -> tuple[str, str]:
  """Returns the color and the shape that an image shows, each "" if it is not found.

  The color is the most frequent among the pixels that are near a color of COLORS. A mask is above
  0.5 where a pixel is nearer to this color than to the color of the border. The mask is cropped to
  the region above 0.5. The shape is the one whose template has the highest correlation with the
  cropped mask.
  """
  pixels = np.asarray(image.convert("RGB"), np.float32)
  distance = np.linalg.norm(pixels[:, :, None] - np.array(list(COLORS.values())), axis=-1)
  near = distance.min(-1) < NEAR
  if not near.any():
    return "", ""
  color = np.bincount(distance.argmin(-1)[near]).argmax()
  border = np.median(np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]), axis=0)
  other = np.linalg.norm(pixels - border, axis=-1)
  mask = other / (other + distance[..., color] + 1e-6)
  if not (mask > 0.5).any():  # The border has the shape's color.
    return list(COLORS)[color], ""
  (top, bottom), (left, right) = (np.percentile(axis, (1, 99)) for axis in np.nonzero(mask > 0.5))
  found = cells(Image.fromarray(mask.astype(np.float32)), (left, top, right + 1, bottom + 1))
  alike = {s: np.corrcoef(found.ravel(), template(s).ravel())[0, 1] for s in SHAPES}
  return list(COLORS)[color], max(alike, key=alike.__getitem__)


def shares(images: list[Image.Image], facts: list[Fact]) -> dict[str, float]:
  """Returns the shares of images that show their caption's color, its shape, and both."""
  right = np.array([[c == f.color, s == f.shape] for (c, s), f in zip(map(seen, images), facts)])
  color, shape = right.mean(0)
  return {"color": float(color), "shape": float(shape), "both": float(right.all(1).mean())}


def nearest_caption(caption: str, others: list[str]) -> int:
  """Returns the index in `others` of the caption that shares the most words with `caption`."""
  words = set(caption.split())
  return int(np.argmax([len(words & set(o.split())) / len(words | set(o.split())) for o in others]))


def judge(workdir: pathlib.Path, count: int) -> dict:
  """Generates and judges images for captions that training does not contain; writes judged.json."""
  training = reader.read_pairs(workdir / "raw", "train")
  captions = [pair.caption for pair in training]
  known = {(f.color, f.shape) for f in all_facts() if f.caption in captions}
  new = [fact for fact in all_facts() if fact.caption not in captions]
  facts = random.Random(0).sample(new, min(count, len(new)))
  model = CM3Leon.load(str(workdir))
  images = [samples[0].image for samples in model.generate([f.caption for f in facts], seed=0)]
  looked_up = [training[nearest_caption(f.caption, captions)].image for f in facts]
  result = {
    "generated": shares(images, facts),
    "looked_up": shares([Image.open(path) for path in looked_up], facts),
    "captions": len(facts),
    "known_combinations": sum((f.color, f.shape) in known for f in facts),
  }
  figures = [
    {
      "title": f"Captions whose {what} the image shows, {len(facts)} new captions",
      "value": result["generated"][what],
      "target": aim,
    }
    for what, aim in AIMS.items()
  ]
  write_json(workdir / "judged.json", {"figures": figures, **result})
  sheet(images, [f.caption for f in facts]).save(workdir / "judged.png")
  report.write(workdir, "own")
  return result


def sheet(images: list[Image.Image], captions: list[str], columns: int = 5) -> Image.Image:
  """Arranges images in rows of `columns` images, each with its caption below."""
  cell = (230, 150)
  made = Image.new("RGB", (cell[0] * columns, cell[1] * -(-len(images) // columns)), "white")
  for i, (image, caption) in enumerate(zip(images, captions)):
    x, y = cell[0] * (i % columns), cell[1] * (i // columns)
    made.paste(image.resize((128, 128), Image.Resampling.NEAREST), (x + 51, y))
    ImageDraw.Draw(made).text((x + 4, y + 132), caption, fill="black")
  return made


def main(argv: list[str]) -> None:
  if argv[1:] == ["make"]:
    make(pathlib.Path(flags.FLAGS.folder))
  elif argv[1:] == ["judge"]:
    print(json.dumps(judge(pathlib.Path(flags.FLAGS.workdir), flags.FLAGS.captions), indent=1))
  else:
    raise UserError("the first argument must be make or judge.")


if __name__ == "__main__":
  flags.DEFINE_string("folder", "my_images", "Folder that `make` writes.")
  flags.DEFINE_string("workdir", "workdir/own", "Run that `judge` judges.")
  flags.DEFINE_integer("captions", 50, "Number of captions.", lower_bound=1)
  app.run(main)

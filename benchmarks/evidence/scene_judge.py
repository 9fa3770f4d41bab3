"""Prints how often the judge of `scenes` is mistaken about original, degraded and wrong images.

  python -m benchmarks.evidence.scene_judge --images=700

The thresholds in cm3leon_jax/scenes/judge/judge.py were chosen with these numbers. The first
columns are shares of images that are judged correct in all facts: for the image's own caption, and
for captions in which one fact of some kind is changed. The last column is the score that 99% of the
objects exceed.
"""

import io
import random
import time

from absl import app, flags
import numpy as np
from PIL import Image
from scipy import ndimage

from examples.scenes import captions, drawings, world
from examples.scenes import source as scenes_source
from examples.scenes.drawings import CELL, SIDE
from examples.scenes.judge import errors as judge_errors
from examples.scenes.judge import judge
from examples.scenes.options import CATEGORIES, COLORS, COMMON, RARE, ScenesConfig
from examples.scenes.world import Placed, Scene

# n images, H height, W width.

_IMAGES = flags.DEFINE_integer("images", 700, "Number of scenes, spread over the categories.", 7)
_SEED = flags.DEFINE_integer("judge_seed", 0, "Seed of the scenes and of their degradation.")

CONFIG = ScenesConfig(rare_objects=len(RARE))
# Name -> kind of change -> strength. "blur" is a standard deviation in pixels, "noise" and
# "blotches" are standard deviations in units of 8-bit pixel values, and "color" is the maximum
# change of a channel in such units.
DEGRADED = {
  "as rendered": {},
  "blur 0.8": {"blur": 0.8},
  "blur 1.2": {"blur": 1.2},
  "noise 15": {"noise": 15},
  "noise 30": {"noise": 30},
  "color 25": {"color": 25},
  "halved": {"halved": True},
  "JPEG 40": {"jpeg": 40},
  "1 pixel off": {"off": 1},
  "weak mixture": {"blur": 0.5, "blotches": 20, "color": 15},
  "strong mixture": {"blur": 0.8, "blotches": 35, "color": 25, "off": 1},
}


def make_scenes(count: int, seed: int) -> tuple[list[Scene], list[dict]]:
  """Returns random scenes of all categories, and the facts of each scene."""
  rng, made, facts = random.Random(seed), [], []
  for i in range(count):
    category = CATEGORIES[i % len(CATEGORIES)]
    number = rng.randrange(world.number_of_scenes_of(CONFIG, category))
    scene = world.scene_at(CONFIG, category, number)
    description = captions.describe(category, scene, rng)
    made.append(scene)
    facts.append(scenes_source.facts_of(category, "", scene, description))
  return made, facts


def degraded(images: np.ndarray, rng: np.random.Generator, **strength) -> np.ndarray:
  """Degrades images as a lossy image tokenizer may do.

  Args:
    images: [n, H, W, 3] uint8.
    rng: random generator for noise and errors.
    **strength: kind of change -> strength, as in DEGRADED.
  """
  pixels = images.astype(np.float64)
  if "color" in strength:  # Changes objects, not the white background.
    ink = (255 - pixels).max(-1, keepdims=True) / 255
    pixels += ink * rng.uniform(-1, 1, (len(images), 1, 1, 3)) * strength["color"]
  if "off" in strength:
    for i in range(len(pixels)):
      y, x = rng.integers(-strength["off"], strength["off"] + 1, 2)
      pixels[i] = ndimage.shift(pixels[i], (y, x, 0), order=0, cval=255)
  if "halved" in strength:
    for i in range(len(pixels)):
      small = Image.fromarray(images[i]).resize((SIDE // 2, SIDE // 2), Image.Resampling.BOX)
      pixels[i] = np.asarray(small.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
  if "blur" in strength:
    pixels = ndimage.gaussian_filter(pixels, (0, strength["blur"], strength["blur"], 0))
  if "blotches" in strength:
    noise = ndimage.gaussian_filter(rng.normal(size=pixels.shape), (0, 1, 1, 0))
    pixels += noise / noise.std() * strength["blotches"]
  if "noise" in strength:
    pixels += rng.normal(0, strength["noise"], pixels.shape)
  result = np.clip(np.rint(pixels), 0, 255).astype(np.uint8)
  return np.stack([_jpeg(x, strength["jpeg"]) for x in result]) if "jpeg" in strength else result


def _jpeg(image: np.ndarray, quality: int) -> np.ndarray:
  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, "JPEG", quality=quality)
  return np.asarray(Image.open(buffer))


def wrong_images(scene: Scene, rng: np.random.Generator) -> dict[str, np.ndarray]:
  """Returns incorrect images of a scene with one object, one for each kind of mistake.

  Args:
    scene: a scene with one object.
    rng: random generator for the mistakes.

  Returns:
    kind -> [H, W, 3] uint8.
  """
  (placed,) = scene.objects
  others = [name for name in COMMON if name != placed.object]
  colors = [color for color in COLORS if color != placed.color]
  name, color = str(rng.choice(others)), str(rng.choice(colors))
  whole = drawings.render(scene)
  recolored = drawings.render(Scene((Placed(placed.object, color, placed.place),)))
  other = drawings.render(Scene((Placed(name, placed.color, placed.place),)))
  blank = np.full_like(whole, 255)
  left, top = drawings.corner(placed.place)
  half = np.zeros((SIDE, SIDE, 1), bool)
  size = (CELL, CELL // 2) if rng.random() < 0.5 else (CELL // 2, CELL)
  half[top : top + size[0], left : left + size[1]] = True
  field = ndimage.gaussian_filter(rng.normal(size=(CELL, CELL)), rng.uniform(1, 4))
  blot = ndimage.gaussian_filter(np.float64(field > np.quantile(field, rng.uniform(0.4, 0.8))), 0.6)
  blotted = blank.copy()
  ink = blot[..., None] * (255 - np.array(COLORS[placed.color]))
  blotted[top : top + CELL, left : left + CELL] = np.rint(255 - ink)
  return {
    "blank": blank,
    "blot": blotted,
    "half an icon": np.where(half, blank, whole),
    "halves of two icons": np.where(half, other, whole),
    "halves of two colors": np.where(half, recolored, whole),
    "another icon": other,
    "another color": recolored,
  }


def measure_wrong(count: int, seed: int) -> dict[str, dict[str, float]]:
  """Judges incorrect images for their captions; half of the scenes have rare objects.

  Returns:
    kind -> {"right": share of images judged correct, "recognized": share of images in which an
    object is recognized}.
  """
  rng, made, facts = np.random.default_rng(seed), {}, []
  for i in range(count):
    names = list(COMMON if i % 2 else RARE)
    parts = (rng.choice(x) for x in (names, list(COLORS), world.PLACES))
    name, color, place = map(str, parts)
    facts.append({"include": [{"class": name, "count": 1, "color": color, "place": place}]})
    for kind, image in wrong_images(Scene((Placed(name, color, place),)), rng).items():
      made.setdefault(kind, []).append(image)
  result = {}
  for kind, images in made.items():
    verdicts = judge.judge_all(np.stack(images), facts)
    seen = [any(x.name != judge.UNKNOWN for x in verdict.found) for verdict in verdicts]
    result[kind] = {
      "right": float(np.mean([verdict.correct for verdict in verdicts])),
      "recognized": float(np.mean(seen)),
    }
  return result


def psnr(images: np.ndarray, others: np.ndarray) -> float:
  """Computes the PSNR in dB between two arrays of images."""
  return float(10 * np.log10(255**2 / np.mean((images.astype(np.float64) - others) ** 2)))


def main(argv) -> None:
  del argv
  made, facts = make_scenes(_IMAGES.value, _SEED.value)
  images = np.stack([drawings.render(scene) for scene in made])
  rng = np.random.default_rng(_SEED.value)
  kinds = ("object", "color", "count", "relation", "place")
  print(f"| images | PSNR (dB) | correct | {' | '.join(kinds)} | least score | s |")
  print("|---" * (len(kinds) + 5) + "|")
  for name, strength in DEGRADED.items():
    changed = degraded(images, rng, **strength)
    start = time.time()
    errors = judge_errors.measure(changed, facts, _SEED.value)
    seconds = time.time() - start
    scores = [thing.score for objects in judge.find_objects(changed) for thing in objects]
    cells = [name, f"{psnr(images, changed):.1f}" if strength else "-", f"{errors['real']:.1%}"]
    cells += [f"{errors['changed'][kind]['right']:.1%}" for kind in kinds]
    cells += [f"{np.percentile(scores, 1):.2f}", f"{seconds:.1f}"]
    print(f"| {' | '.join(cells)} |", flush=True)
  print("\n| image of | judged correct | an object is recognized |\n|---|---|---|")
  for kind, shares in measure_wrong(_IMAGES.value, _SEED.value).items():
    print(f"| {kind} | {shares['right']:.1%} | {shares['recognized']:.1%} |")


if __name__ == "__main__":
  app.run(main)

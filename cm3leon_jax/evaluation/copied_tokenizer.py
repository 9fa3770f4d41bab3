"""Checks how well a copied image tokenizer reconstructs the images of a run.

A decoder can learn the codes of any images, so its loss falls even if the codes describe the images
badly. A tokenizer that was trained on icons turns photos into blobs, for example.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
import itertools
from typing import Any

from etils import epath, epy

from cm3leon_jax.config import own_functions
from cm3leon_jax.config.settings import Settings
from cm3leon_jax.errors import UserError
from cm3leon_jax.stages import stages

with epy.lazy_imports():
  import numpy as np

  from cm3leon_jax.data.instructions import edges, sources
  from cm3leon_jax.data.raw import reader
  from cm3leon_jax.evaluation.metrics import reconstructions
  from cm3leon_jax.generation import writer
  from cm3leon_jax.tokenizers import vqgan

IMAGES, COLUMNS = 16, 8
RECORDS = 2_000  # The check looks at this many records of a task.
SHEET = "reconstructions.png"


def check_pairs(settings: Settings, workdir: epath.Path, limits: tuple[float, float]) -> None:
  """Checks 16 evenly spaced training images of the run's pairs, see `_check`."""
  source = _copied_from(workdir)
  if own_functions.is_function(settings.raw.source) or not source:
    return
  pairs = [pair for pair in reader.read_pairs(workdir / "raw", "train") if not pair.added_crop]
  images = [pair.image for pair in evenly(pairs, IMAGES)]
  _check(settings, workdir, source, images, "documents", limits)


def check_records(
  settings: Settings, workdir: epath.Path, tasks: Sequence[Any], limits: tuple[float, float]
) -> None:
  """Checks 16 images of the tasks, see `_check`.

  They are evenly spaced over the first `RECORDS` records of each task: a file may be sorted.
  """
  if not tasks or not (source := _copied_from(workdir)):
    return
  images = []
  for task in tasks:
    records = sources.open_task(task, "train", settings.instructions)
    chosen = spread(itertools.islice(records, RECORDS), IMAGES)
    images += [image for record in chosen for image in record.images.values()]
  given = [image for image in images if not isinstance(image, edges.ImageMap)]
  # Several records may have the same file.
  distinct = {image if isinstance(image, str) else id(image): image for image in given}
  images = evenly(list(distinct.values()), IMAGES)
  _check(settings, workdir, source, images, "instructions", limits)


def evenly(items: Sequence[Any], count: int) -> list[Any]:
  """Returns `count` evenly spaced items, or all: evenly("abcdefg", 3) = ["a", "c", "e"]."""
  number = min(count, len(items))
  return [items[i * len(items) // number] for i in range(number)]


def spread(items: Iterable[Any], count: int) -> list[Any]:
  """Returns at least `count` items, or all, evenly spaced; keeps fewer than 2 `count` at a time."""
  kept: list[Any] = []
  every = 1
  for number, item in enumerate(items):
    if number % every == 0:
      kept.append(item)
    if len(kept) == 2 * count:
      kept, every = kept[::2], 2 * every
  return kept


def _copied_from(workdir: epath.Path) -> str:
  """Returns the run from which the image tokenizer of a workdir was copied, or ""."""
  done = stages.require(workdir, "vqgan", summary=dict)
  return str(done["summary"].get("copied_from", ""))


def _check(
  settings: Settings, workdir: epath.Path, source: str, images: Sequence[Any], stage: str,
  limits: tuple[float, float],
) -> None:  # fmt: skip
  """Reconstructs images, writes them to the folder of a stage, and prints how good they are.

  Args:
    source: the run from which the tokenizer was copied.
    images: paths of images, or pixels.
    limits: least mean PSNR in dB, and largest mean difference of color; 0: any.

  Raises:
    UserError: the mean PSNR or the mean difference of color is beyond its limit. A tokenizer of the
      package has no limit: it was trained on images of many kinds.
  """
  if not images:
    return
  side, crop = settings.vqgan.resolution, settings.raw.crop
  originals = np.stack([reader.load_image(image, side, crop) for image in images])
  tokenizer = vqgan.ImageTokenizer.load(workdir / "vqgan").in_batches(IMAGES)
  made = tokenizer.decode(tokenizer.encode(originals))
  measured = [reconstructions.compare(*pair) for pair in zip(originals, made)]
  decibels, color = np.mean(measured, 0)
  rows, labels = [], []
  for start in range(0, len(images), COLUMNS):
    for label, pixels in (("images", originals), ("reconstructions", made)):
      rows.append(list(pixels[start : start + COLUMNS]))
      labels.append(label)
  folder = workdir / stage
  folder.mkdir(parents=True, exist_ok=True)
  writer.save_png(folder / SHEET, writer.contact_sheet(rows, labels))
  result = f"{decibels:.1f} dB and a color difference of {color:.1f} in Lab"
  print(
    f"reconstructions: the image tokenizer of {source} reconstructs {len(images)} of your images "
    f"with {result}, of background or drawing, whichever is worse ({folder / SHEET}).",
    flush=True,
  )
  least, most = limits
  if settings.vqgan.source:
    return
  if decibels < least or color > (most or np.inf):
    raise UserError(
      f"the image tokenizer of {source} reconstructs your images with {result}, beyond --min_psnr "
      f"= {least:g} or --max_color_difference = {most:g} ({folder / SHEET} shows them): train one "
      "on your images, with --own_image_tokenizer and another --workdir, or loosen the limit."
    )

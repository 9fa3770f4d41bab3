"""Writes samples to files: images, results.jsonl and a contact sheet; names their folder."""

# H height, W width of an image.

from collections.abc import Mapping, Sequence
import dataclasses
import hashlib
import io
import json
import textwrap
from typing import Any

from etils import epath
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cm3leon_jax.files.atomic import replacing
from cm3leon_jax.files.digests import digest_of_json
from cm3leon_jax.generation.image_tasks import ImageTask
from cm3leon_jax.generation.sample import CELL, GAP, Sample, describe_found
from cm3leon_jax.generation.tasks import IMAGE, Task, slug
from cm3leon_jax.generation.text_tasks import TextTask
from cm3leon_jax.run.run import Run, ids
from cm3leon_jax.stages import table

SHEET_ROWS = 64  # Few programs can open a sheet with more rows.
ORIGIN = ("key", "source", "license", "attribution")  # Fields for a neighbor in results.jsonl.
LABEL_WIDTH = 150
LABEL_HEIGHT = 20


class Writer:
  """Writes the samples of several tasks to a folder.

  writer = Writer(folder, num_samples)
  samples = pipeline.generate(tasks, num_samples, on_batch=writer.save_images)
  records = writer.finish(samples)
  """

  def __init__(self, folder: epath.PathLike, num_samples: int = 1):
    self.folder, self.num_samples = epath.Path(folder), num_samples

  def file_names(self, sample: Sample) -> list[str]:
    """Returns the names of the files for a sample's images."""
    stem = sample.task.file_stem
    if self.num_samples > 1:
      stem += f"_sample{sample.index}"
    if not sample.task.numbers_images:
      return [f"{stem}.png"] * len(sample.codes)
    return [f"{stem}_image{i}.png" for i in range(len(sample.codes))]

  def save_images(self, samples: Sequence[Sample]) -> None:
    """Writes the images of `samples`, such as those of one batch."""
    for sample in samples:
      images = [s for s in sample.segments if not isinstance(s, str)]
      for name, image in zip(self.file_names(sample), images):
        save_png(self.folder / name, image)

  def finish(self, samples: Sequence[Sequence[Sample]]) -> list[dict]:
    """Writes results.jsonl and contact_sheet.png, and returns the lines of results.jsonl."""
    save_png(self.folder / "contact_sheet.png", sample_sheet(samples))
    records = [record(s, self.file_names(s)) for of_task in samples for s in of_task]
    with replacing(self.folder / "results.jsonl", "w") as file:
      file.write("".join(json.dumps(line) + "\n" for line in records))
    return records


def record(sample: Sample, files: list[str]) -> dict:
  """Returns the line for a sample in results.jsonl (docs/workdir.md)."""
  task = sample.task
  return {
    "task": task.name,
    "prompt": task.prompt,
    "key": task.key,
    "concept": task.concept,
    "image": task.image if isinstance(task.image, str) else "",
    "box": list(task.box),
    "seed": sample.seed,
    "sample": sample.index,
    "rank": sample.rank,
    **dataclasses.asdict(task.sampling),
    "contrastive": sample.contrastive,
    "retrieve": task.retrieve,
    "keep_neighbors": task.keep_neighbors,
    "neighbors": [{name: getattr(d, name) for name in ORIGIN} for d in sample.neighbors],
    **_answer(sample, files),
    "tokens": sample.tokens.tolist(),
    "log_probs": [round(float(p), 4) for p in sample.log_probs],
    "log_prob": float(sample.log_probs.sum(dtype=np.float64)),
    "clip_score": sample.clip_score,
    "divergence": sample.divergence,
  }


def _answer(sample: Sample, files: list[str]) -> dict:
  """Returns the fields of `record` with the answer of a sample: texts, codes and files."""
  if isinstance(sample.task, ImageTask):
    return {"file": files[0], "codes": sample.codes[0].tolist()}
  if isinstance(sample.task, TextTask):
    return {"text": sample.segments[0], "filled": list(sample.filled)}
  lines = [s if isinstance(s, str) else IMAGE for s in sample.segments]
  return {"files": files, "text": "\n".join(lines)}


def sample_sheet(samples: Sequence[Sequence[Sample]]) -> Image.Image:
  """Draws up to SHEET_ROWS rows, one per prompt: the input or the true image, then the samples.

  The true image of a held-out caption is a reconstruction from its codes.
  """
  rows, titles, labels = {}, {}, {}
  result: dict[tuple, list[int]] = {}  # Numbers of documents in a column.
  for first, *_ in samples:
    column = (first.task.retrieve, first.task.settings_label)
    result.setdefault(column, []).append(len(first.neighbors))
  for of_task in samples:
    task, given = of_task[0].task, of_task[0].given
    row = task.row
    if row >= SHEET_ROWS:
      continue
    if row not in rows:
      labels[row] = task.label
      rows[row] = [] if given is None else [given]
      titles[row] = [] if given is None else ["reconstruction" if task.key else "given"]
    column = (task.retrieve, task.settings_label)
    title = f"{describe_found(result[column], task.retrieve)}, {column[1]}" if column[1] else ""
    for n, sample in enumerate(of_task, 1):
      rows[row] += sample.segments
      numbered = f"{title} #{n}".strip() if len(of_task) > 1 else title
      titles[row] += [numbered] * len(sample.segments)
  columns = list(titles.values())
  alike = all(column == columns[0] for column in columns)
  above = columns[0] if alike and any(columns[0]) else ()
  return contact_sheet(list(rows.values()), list(labels.values()), above)


def save_png(path: epath.PathLike, image: Image.Image | np.ndarray) -> None:
  """Writes an image, uint8 [H, W, 3] or a PIL image, to a PNG file atomically."""
  image = image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))
  buffer = io.BytesIO()
  image.save(buffer, "PNG", optimize=True)
  with replacing(path) as file:
    file.write(buffer.getvalue())


def contact_sheet(
  rows: Sequence[Sequence], labels: Sequence[str], columns: Sequence[str] = ()
) -> Image.Image:
  """Draws rows of images and texts, with labels. Small images are enlarged without smoothing.

  A cell is a text or an image, uint8 [H, W, 3]. All images have the same size. `labels` are left of
  the rows, and the titles in `columns` are above them.
  """
  sizes = [np.shape(cell)[:2] for row in rows for cell in row if not isinstance(cell, str)]
  height, width = sizes[0] if sizes else (CELL, CELL)
  scale = max(1, -(-CELL // min(height, width)))
  height, width = height * scale, width * scale
  count, top = max(len(row) for row in rows), LABEL_HEIGHT if columns else GAP
  size = (LABEL_WIDTH + count * (width + GAP), top + len(rows) * (height + GAP))
  sheet = Image.new("RGB", size, "white")
  draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
  for j, label in enumerate(columns):
    draw.text((LABEL_WIDTH + j * (width + GAP), GAP // 2), label, "black", font)
  for i, (row, label) in enumerate(zip(rows, labels)):
    y = top + i * (height + GAP)
    draw.text((GAP, y), wrapped(label, LABEL_WIDTH, height), "black", font)
    for j, cell in enumerate(row):
      x = LABEL_WIDTH + j * (width + GAP)
      if isinstance(cell, str):
        draw.text((x, y), wrapped(cell, width, height), "black", font)
      else:
        image = Image.fromarray(np.asarray(cell))
        sheet.paste(image.resize((width, height), Image.Resampling.NEAREST), (x, y))
  return sheet


def wrapped(text: str, width: int, height: int) -> str:
  """Breaks a text into lines for a cell of `width` x `height` pixels. Cuts what does not fit."""
  lines, most = textwrap.wrap(text, max(1, width * 22 // LABEL_WIDTH)), max(1, height // 14)
  return "\n".join(
    lines if len(lines) <= most else [*lines[: most - 1], lines[most - 1][:-1] + "…"]
  )


def needs_clip(trained: Run, tasks: Sequence[Task]) -> bool:
  """Returns whether CLIP retrieves or scores; without tasks, it scores held-out captions."""
  return trained.has_clip and (not tasks or any(t.retrieve or t.is_scored for t in tasks))


def identity(
  trained: Run,
  bank: Run | None,
  tasks: Sequence[Task],
  more: Mapping[str, Any],
) -> dict[str, Any]:
  """Returns all values on which samples depend. Checks that the required stages are finished.

  Args:
    bank: the run whose documents are retrieved; None: `trained`.
    tasks: empty for held-out captions.
    more: other values, such as the number of samples.
  """
  settings = trained.settings
  read = [
    *table.TOKENIZERS,
    "train",
    *(table.own_clip(settings) if needs_clip(trained, tasks) else ()),
  ]
  inputs = ids(trained, read)
  if not tasks or any(task.retrieve for task in tasks):
    inputs |= ids(bank or trained, ["documents", "neighbors"])
  result = {"inputs": inputs, **table.identity(settings, "samples"), **more}
  if tasks:
    result["tasks"] = [task.identity() for task in tasks]
  else:
    result["sampling"] = dataclasses.asdict(settings.sampling)
  return result


def digests(images: Mapping[Any, np.ndarray]) -> dict[str, str]:
  """Maps "path, crop" of each input image to the SHA-256 of its pixels."""
  return {
    f"{image}, crop {crop}": hashlib.sha256(pixels.tobytes()).hexdigest()
    for (image, crop), pixels in images.items()
  }


def folder_of(
  root: epath.Path, tasks: Sequence[Task], values: dict[str, Any], file: str | None = None
) -> epath.Path:
  """Returns the folder of the samples. Each set of tasks and settings has a separate folder.

  `values` is their `identity`; `file` is the prompt file, if any.
  """
  if not tasks:
    return root / "samples"
  digest = digest_of_json(values)[:8]
  for folder in sorted((root / "prompts").glob(f"*-{digest}")):
    return folder  # The folder keeps its name if the prompt file is renamed.
  name = epath.Path(file).stem if file else tasks[0].prompt or tasks[0].name
  return root / "prompts" / f"{slug(name)}-{digest}"

"""Computes previews of a sample during generation: rows of its image, or its text so far."""

# I tokens of an image, G tokens so far, H height, W width.

import dataclasses

import numpy as np

from cm3leon_jax.config import UserError
from cm3leon_jax.generation.image_tasks import Edit, InfillImage, TextToImage, whole_codes
from cm3leon_jax.generation.pipeline import Pipeline
from cm3leon_jax.generation.tasks import PromptLayout, Task
from cm3leon_jax.generation.text_tasks import Caption, InfillText, Question
from cm3leon_jax.serving.errors import refusal

TO_COME = 160  # Gray value of rows that are not generated yet.


def image(
  task: Task, layout: PromptLayout, tokens: np.ndarray, given: np.ndarray | None
) -> tuple[int, np.ndarray]:
  """Returns the codes of a preview of an image, from the [G] tokens generated so far.

    side 4, tokens 5 6 7 8 9 9: 1 complete row, codes 5 6 7 8, then 5 6 7 8 in each other row

  The decoder of the image tokenizer is not causal: pixels of a complete row still change a little
  when the rows below it are generated. `given` are the [I] codes of the input image around the box
  of an infill. Returns (number of complete rows of the image or of the box; [I] codes, with missing
  rows filled in).
  """
  codes = layout.vocab.image_codes(tokens[layout.vocab.is_image(tokens)])
  side = layout.side
  if isinstance(task, InfillImage) and given is not None:
    left, top, right, bottom = whole_codes(task.box, layout.resolution, side)
    places = np.arange(side * side).reshape(side, side)[top:bottom, left:right].ravel()
    rows, whole = len(codes) // (right - left), given.copy()
    done = rows * (right - left)
    whole[places[:done]] = codes[:done]
    return rows, whole
  rows = len(codes) // side
  if not rows:
    return 0, np.zeros(side * side, np.int32)
  complete = codes[: rows * side].reshape(rows, side)
  below = np.repeat(complete[-1:], side - rows, axis=0)
  return rows, np.concatenate([complete, below]).ravel()


def without_rows_to_come(
  task: Task, layout: PromptLayout, pixels: np.ndarray, rows: int
) -> np.ndarray:
  """Grays out the rows of [H, W, 3] pixels that are not generated yet. Leaves infills unchanged."""
  if isinstance(task, InfillImage):
    return pixels
  shown = pixels.copy()
  shown[rows * (layout.resolution // layout.side) :] = TO_COME
  return shown


def total_rows(task: Task, layout: PromptLayout) -> int:
  """Returns how many rows of codes a task generates."""
  if isinstance(task, InfillImage):
    _, top, _, bottom = whole_codes(task.box, layout.resolution, layout.side)
    return bottom - top
  return layout.side


def text(task: Task, layout: PromptLayout, tokens: np.ndarray) -> str:
  """Decodes the ids [G] of a text so far, without an incomplete last character.

  For a text with holes, returns "", because it is complete only when all holes are filled.
  """
  if isinstance(task, InfillText):
    return ""
  vocab = layout.vocab
  ends = np.flatnonzero(tokens < vocab.num_special)
  first = tokens[: ends[0]] if len(ends) else tokens
  return layout.decode(first).strip().rstrip("\ufffd")


def usual_tasks(pipeline: Pipeline) -> list[Task]:
  """Returns example tasks with the usual kinds and lengths of prompts.

  Their buckets are compiled before the first request. Longer prompts use a larger bucket.
  """
  layout, sampling = pipeline.layout, pipeline.settings.sampling
  blank = np.full((layout.resolution, layout.resolution, 3), 128, np.uint8)
  caption, retrieve = "a red apple", pipeline.usual_retrieve
  box = (0, 0, layout.resolution // 2, layout.resolution // 2)
  tasks = [
    TextToImage(caption, retrieve=0),
    Caption(image=blank),
    Question(image=blank, prompt="What color is the apple?"),
    Edit(image=blank, prompt="make it blue"),
    InfillImage(image=blank, box=box, prompt=caption),
  ]
  if retrieve and len(pipeline.documents):
    # The caption of a document retrieves at least that document, even if no other is similar.
    known = layout.decode(pipeline.documents[0].segments[0].tokens)
    tasks.insert(0, TextToImage(known, retrieve=retrieve))
  return [dataclasses.replace(task, sampling=sampling) for task in tasks]


def whole_box(layout: PromptLayout, box: tuple[int, ...]) -> tuple[int, ...]:
  """Enlarges a box, in pixels, to whole codes. Raises ApiError if the box is invalid."""
  side = layout.resolution
  if min(box) < 0 or max(box) > side:
    raise refusal(
      f"box is {','.join(map(str, box))}; it must lie within {side} x {side} pixels, the size to "
      "which the centered square of the image is scaled.",
      "box",
    )
  try:
    codes = whole_codes(box, layout.resolution, layout.side)
  except UserError as error:
    raise refusal(str(error), "box") from error
  return tuple(layout.resolution // layout.side * x for x in codes)

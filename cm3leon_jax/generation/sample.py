"""Defines a sample: one generated result, with its texts, images, token ids and scores."""

# I tokens per image, G generated tokens, H height, W width.

from collections.abc import Callable, Collection, Sequence
import dataclasses
import io

import numpy as np
from PIL import Image

from cm3leon_jax.data.documents.store import Document
from cm3leon_jax.errors import UserError
from cm3leon_jax.generation.explanation import Influence
from cm3leon_jax.generation.tasks import Task

CELL = 128  # Minimum side of an image on a sheet, in pixels.
GAP = 6


@dataclasses.dataclass(frozen=True, repr=False)
class Sample:
  """Generated result of a task.

  Attributes:
    index: index of the sample among those of the task, starting at 0.
    seed: a task with this seed and one sample reproduces this sample.
    segments: texts and images, uint8 [H, W, 3], in order.
    codes: int32 codes [I] of each image.
    filled: generated text for each hole.
    tokens: all generated ids, int32 [G].
    log_probs: fp32 [G], log-probabilities of `tokens` under the guided distribution, before
      temperature and filters.
    contrastive: whether the image codes were sampled by contrastive decoding.
    neighbors: retrieved documents, best first.
    given: uint8 [H, W, 3], the task's input image, or the image of a held-out caption, decoded from
      its codes; None if there is neither.
    clip_score: cosine similarity of image and caption; None if CLIP did not score the sample.
    rank: rank by clip_score among the task's samples, starting at 1; None if they are not ranked.
    divergence: mean over the image codes of KL(with prompt || without prompt), in nats; None if it
      was not computed.
    explainer: computes `explain` with the model that generated the sample.
  """

  task: Task
  index: int
  seed: int
  segments: tuple
  codes: tuple[np.ndarray, ...]
  filled: tuple[str, ...]
  tokens: np.ndarray
  log_probs: np.ndarray
  contrastive: bool
  neighbors: tuple[Document, ...]
  given: np.ndarray | None = None
  clip_score: float | None = None
  rank: int | None = None
  divergence: float | None = None
  explainer: Callable[..., list[Influence]] | None = dataclasses.field(default=None, compare=False)

  def __repr__(self) -> str:
    score = "" if self.clip_score is None else f", CLIP score {self.clip_score:.3f}"
    return f"Sample({self.task.label!r}, seed {self.seed}, {len(self.neighbors)} neighbors{score})"

  def explain(self) -> list[Influence]:
    """Returns the influence of each retrieved document on the image, see `explanation.explain`.

    model.generate("a green bell")[0].explain()[0].heat_map.save("why.png")
    """
    assert self.explainer is not None
    image = next((s for s in self.segments if not isinstance(s, str)), None)
    return self.explainer(self.task, image, self.codes, self.neighbors)

  @property
  def parts(self) -> list[str | Image.Image]:
    """All texts and images of the sample, in order."""
    return [s if isinstance(s, str) else Image.fromarray(s) for s in self.segments]

  @property
  def images(self) -> list[Image.Image]:
    return [part for part in self.parts if not isinstance(part, str)]

  @property
  def image(self) -> Image.Image | None:
    """First image of the sample, or None."""
    return next(iter(self.images), None)

  @property
  def text(self) -> str:
    """All texts of the sample, one per line."""
    return "\n".join(s for s in self.segments if isinstance(s, str))

  def _repr_png_(self) -> bytes | None:
    """Shows the images of the sample in a notebook."""
    if not self.images:
      return None
    buffer = io.BytesIO()
    grid([self]).save(buffer, "PNG")
    return buffer.getvalue()


def describe_found(counts: Collection[int], retrieve: int) -> str:
  """Formats how many documents were found of the `retrieve` requested ones; one count per sample.

  describe_found([1], 1) = "1 retrieved", describe_found([0, 1], 2) = "0 to 1 of 2 retrieved"
  """
  least, most = min(counts), max(counts)
  found = f"{least}" if least == most else f"{least} to {most}"
  return f"{found} retrieved" if least == retrieve else f"{found} of {retrieve} retrieved"


def grid(samples: Sequence[Sample], columns: int = 4) -> Image.Image:
  """Draws the images of samples in rows of `columns`. Small images are enlarged without smoothing.

  grid(model.generate("a green bell", num_samples=8)).save("bells.png")
  """
  images = [image for sample in samples for image in sample.images]
  if not images:
    raise UserError("the samples have no images: give those of `generate`.")
  scale = max(1, -(-CELL // min(images[0].size)))
  width, height = (side * scale + GAP for side in images[0].size)
  columns = min(columns, len(images))
  sheet = Image.new(
    "RGB", (columns * width - GAP, -(-len(images) // columns) * height - GAP), "white"
  )
  for number, image in enumerate(images):
    row, column = divmod(number, columns)
    shown = image.resize((width - GAP, height - GAP), Image.Resampling.NEAREST)
    sheet.paste(shown, (column * width, row * height))
  return sheet


def ranked(samples: Sequence[Sample]) -> list[Sample]:
  """Sorts and ranks the samples of a task by CLIP score. Samples without a score are last."""

  def score(sample: Sample) -> float:
    return -np.inf if sample.clip_score is None else sample.clip_score

  order = sorted(samples, key=score, reverse=True)
  return [dataclasses.replace(sample, rank=n) for n, sample in enumerate(order, 1)]

"""One generated result: texts, images, ids, scores."""

# I tokens of an image, G generated tokens, H height, W width.

from collections.abc import Sequence
import dataclasses

import numpy as np
from PIL import Image

from cm3leon_jax.config import short
from cm3leon_jax.data.documents.store import Document
from cm3leon_jax.generation.tasks import Task


@dataclasses.dataclass(frozen=True, repr=False)
class Sample:
  """One generated result.

  Attributes:
    task: the task.
    index: number of the sample among those of the task, from 0 on.
    seed: the seed that gives it alone.
    segments: texts, and [H, W, 3] uint8 images, in their order.
    codes: [I] int32 codes of each image.
    filled: the text of each hole.
    tokens: [G] int32, all generated ids.
    log_probs: [G] fp32, of each id under the guided distribution, before temperature and filters.
    contrastive: whether its image codes were sampled by contrastive decoding.
    neighbors: retrieved documents, best first.
    given: [H, W, 3] uint8, the image of the task, or the original of a held-out caption, or None.
    clip_score: cosine of image and caption, or None.
    rank: its place among the samples of the task by clip_score, from 1 on; None: not ranked.
    divergence: mean over its image codes of KL(with prompt || without) in nats, or None.
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

  def __repr__(self) -> str:
    prompt = [short(self.task.prompt)] if self.task.prompt else []
    parts = [short(s) if isinstance(s, str) else _size(s) for s in self.segments]
    texts = [self.task.name, *prompt, *parts, f"seed {self.seed}"]
    if self.clip_score is not None:
      texts.append(f"CLIP score {self.clip_score:.3f}")
    if self.neighbors:
      texts.append(f"{len(self.neighbors)} retrieved")
    return f"Sample({', '.join(texts)})"

  @property
  def parts(self) -> list[str | Image.Image]:
    """All texts and images in their order."""
    return [s if isinstance(s, str) else Image.fromarray(s) for s in self.segments]

  @property
  def images(self) -> list[Image.Image]:
    """Returns all images."""
    return [part for part in self.parts if not isinstance(part, str)]

  @property
  def image(self) -> Image.Image | None:
    """Returns the first image, None if there is none."""
    return next(iter(self.images), None)

  @property
  def text(self) -> str:
    """Returns all texts, one per line."""
    return "\n".join(s for s in self.segments if isinstance(s, str))


def _size(image: np.ndarray) -> str:
  return f"image of {image.shape[1]} x {image.shape[0]}"


def ranked(samples: Sequence[Sample]) -> list[Sample]:
  """Ranks the samples of a task by CLIP score, best first; samples without one come last."""

  def score(sample: Sample) -> float:
    return -np.inf if sample.clip_score is None else sample.clip_score

  order = sorted(samples, key=score, reverse=True)
  return [dataclasses.replace(sample, rank=n) for n, sample in enumerate(order, 1)]

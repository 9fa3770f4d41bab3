"""Defines records of instruction data: named texts and images, which a task's template joins."""

from collections.abc import Iterator, Mapping
import dataclasses
from typing import Any, Protocol

import numpy as np

from cm3leon_jax.data.instructions.edges import ImageMap


@dataclasses.dataclass(frozen=True)
class Record:
  """Named texts and images of one training or held-out sample.

  Attributes:
    key: unique in its source.
    group: e.g. the id of an image. Records of one group are not independent.
    texts: name -> text; a name is e.g. "question".
    images: name -> path, [H, W, 3] uint8 pixels, or a map to compute from an image.
    facts: what a judge needs to know about the record. May be empty.
  """

  key: str
  group: str
  texts: Mapping[str, str]
  images: Mapping[str, str | np.ndarray | ImageMap]
  facts: Mapping = dataclasses.field(default_factory=dict)


class DrawnTasks(Protocol):
  """Tasks of a world, which draws their records and images. Must be picklable for the workers."""

  def records(self, task: str, split: str, number: int) -> Iterator[Record]:
    """Yields the first `number` records of a task.

    Raises:
      UserError: the task or split does not exist, or the packages of an extra are not installed.
    """

  def identity(self) -> dict[str, Any]:
    """Returns everything that the records depend on, except the task and the split."""

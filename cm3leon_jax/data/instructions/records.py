"""Defines a record of instruction data: named texts and images, which a task's template joins."""

from collections.abc import Iterator, Mapping
import dataclasses
from typing import Any, Protocol

import numpy as np

from cm3leon_jax.data.instructions.edges import ImageMap


@dataclasses.dataclass(frozen=True)
class Record:
  """A record.

  Attributes:
    key: unique in its source.
    group: what it belongs to, e.g. the id of an image; records of one group are not independent.
    texts: name -> text, e.g. "question".
    images: name -> path, or [H, W, 3] uint8 pixels, or a map that is computed from either.
    facts: what a judge needs to know; {} if nothing.
  """

  key: str
  group: str
  texts: Mapping[str, str]
  images: Mapping[str, str | np.ndarray | ImageMap]
  facts: Mapping = dataclasses.field(default_factory=dict)


class DrawnTasks(Protocol):
  """Tasks of a world: it draws their records, with the images. They are pickled to the workers."""

  def records(self, task: str, split: str, number: int) -> Iterator[Record]:
    """Yields the first records of a task.

    Raises:
      UserError: there is no such task or split, or the packages of an extra are absent.
    """

  def identity(self) -> dict[str, Any]:
    """Returns what the records depend on, beside task and split."""

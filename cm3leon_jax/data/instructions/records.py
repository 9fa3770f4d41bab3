"""Defines a record of instruction data: named texts and images, which a task's template joins."""

from collections.abc import Mapping
import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Record:
  """A record.

  Attributes:
    key: unique in its source.
    group: what it belongs to, e.g. the id of an image; records of one group are not independent.
    texts: name -> text, e.g. "question".
    images: name -> path, or [H, W, 3] uint8 pixels.
    facts: what a judge needs to know; {} if nothing.
  """

  key: str
  group: str
  texts: Mapping[str, str]
  images: Mapping[str, str | np.ndarray]
  facts: Mapping = dataclasses.field(default_factory=dict)

"""Defines records of instruction data. A template joins the texts and images of a record."""

from collections.abc import Iterable, Iterator, Mapping
import dataclasses

import numpy as np

from cm3leon_jax.data.instructions.edges import ImageMap
from cm3leon_jax.data.published.examples import Example, caption_prompts


@dataclasses.dataclass(frozen=True)
class Record:
  """Named texts and images of one training or held-out sample.

  Attributes:
    key: unique in its source.
    group: for example the id of an image. Records of one group are not independent.
    texts: dict from a name, such as "question", to a text.
    images: dict from a name to a path, pixels [H, W, 3] uint8, or an `ImageMap`, which is
      computed later.
    facts: facts that decide in an evaluation whether an answer is correct. May be empty.
  """

  key: str
  group: str
  texts: Mapping[str, str]
  images: Mapping[str, str | np.ndarray | ImageMap]
  facts: Mapping = dataclasses.field(default_factory=dict)


def caption_records(examples: Iterable[Example]) -> Iterator[Record]:
  """Yields one record per caption. Its key is as in `caption_prompts`."""
  for example in caption_prompts(examples):
    assert example.prompt is not None
    assert example.image is not None
    texts = {"caption": example.prompt}
    yield Record(example.key, example.group, texts, {"image": example.image})

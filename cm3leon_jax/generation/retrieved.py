"""Documents of the bank as a user sees them: caption, image, similarity, origin."""

from collections.abc import Sequence
import dataclasses

import numpy as np
from PIL import Image

from cm3leon_jax.config import UserError
from cm3leon_jax.generation.pipeline import Pipeline


@dataclasses.dataclass(frozen=True)
class Retrieved:
  """One document of the bank.

  Attributes:
    key: its name.
    caption: its text.
    image: decoded from its codes.
    similarity: cosine of the query and the document under the run's CLIP.
    source, license, attribution: of the original work.
  """

  key: str
  caption: str
  image: Image.Image
  similarity: float
  source: str
  license: str
  attribution: str


def search(
  pipeline: Pipeline, queries: Sequence[tuple[str, object]], count: int
) -> list[list[Retrieved]]:
  """Finds up to `count` documents for each query, best first; see `Pipeline.search`.

  Raises:
    UserError: the bank is empty, or `count` is too large.
  """
  if not len(pipeline.documents):
    raise UserError(f"{pipeline.documents.folder} holds no documents to retrieve.")
  nearest, vocab = pipeline.search(queries, count), pipeline.layout.vocab
  codes = [vocab.image_codes(d.segments[1].tokens) for found, _ in nearest for d in found]
  images = iter(pipeline.image_tokenizer.decode(np.stack(codes)) if codes else ())
  return [
    [
      Retrieved(
        document.key,
        pipeline.layout.decode(document.segments[0].tokens),
        Image.fromarray(next(images)),
        float(similarity),
        document.source,
        document.license,
        document.attribution,
      )
      for document, similarity in zip(found, similarities)
    ]
    for found, similarities in nearest
  ]

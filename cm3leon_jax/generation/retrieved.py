"""Retrieves documents for a user, with their captions, images, similarities and origins."""

from collections.abc import Sequence
import dataclasses

import numpy as np
from PIL import Image

from cm3leon_jax.data.documents.store import Document
from cm3leon_jax.errors import UserError
from cm3leon_jax.generation.pipeline import Pipeline


@dataclasses.dataclass(frozen=True)
class Retrieved:
  """Retrieved document. `similarity` is its cosine similarity to the query, by CLIP."""

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
  """Finds up to `count` documents for each query, best first. See `Pipeline.search`.

  Raises:
    UserError: the bank is empty, or `count` is too large.
  """
  if pipeline.bank is not None and not len(pipeline.documents):
    raise UserError(f"{pipeline.documents.folder} has no documents to retrieve.")
  nearest = pipeline.search(queries, count)
  images = iter(images_of(pipeline, [document for found, _ in nearest for document in found]))
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


def images_of(pipeline: Pipeline, documents: Sequence[Document]) -> list[np.ndarray]:
  """Decodes the images of documents from their codes. Each image is uint8 [H, W, 3]."""
  if not documents:
    return []
  vocab = pipeline.layout.vocab
  codes = [vocab.image_codes(document.segments[1].tokens) for document in documents]
  return list(pipeline.image_tokenizer.decode(np.stack(codes)))

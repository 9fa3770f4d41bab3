"""Retrieves documents for a user, with their origins, and opens the bank that has them."""

from collections.abc import Sequence
import dataclasses

import numpy as np
from PIL import Image

from cm3leon_jax.data.documents.store import Document
from cm3leon_jax.errors import UserError
from cm3leon_jax.generation.pipeline import Pipeline
from cm3leon_jax.run.run import Run, ids
from cm3leon_jax.run.source import Source
from cm3leon_jax.stages import stages, table


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
  images = iter(images_of(pipeline, [document for result, _ in nearest for document in result]))
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
      for document, similarity in zip(result, similarities)
    ]
    for result, similarities in nearest
  ]


def images_of(pipeline: Pipeline, documents: Sequence[Document]) -> list[np.ndarray]:
  """Decodes the images of documents from their codes. Each image is uint8 [H, W, 3]."""
  if not documents:
    return []
  vocab = pipeline.layout.vocab
  codes = [vocab.image_codes(document.segments[1].tokens) for document in documents]
  return list(pipeline.image_tokenizer.decode(np.stack(codes)))


def bank_of(trained: Run, given: str | None = None) -> Run | None:
  """Returns the run or bundle that has the documents to retrieve; None if there are none.

  Args:
    trained: the run that generates.
    given: value of --bank; None: the bank of `trained`.

  Raises:
    UserError: `given` has no bank, or was built with other tokenizers or another CLIP.
  """
  settings = trained.settings
  if given is None:
    return trained if trained.bank else None
  source, read = Source.of(given), (*table.TOKENIZERS, *table.own_clip(settings))
  folder = source.folder
  if source.kind == "bundle":
    bank = Run.open(folder)
    if bank.bank is None:
      raise UserError(f"--bank is {folder}, a bundle without documents: give one with documents.")
    found = {"clip": bank.settings.retrieval.clip, **ids(bank, read)}
    remedy = "give the bundle whose tokenizers and CLIP this run has, or a workdir"
  else:
    bank = Run(folder, settings)
    documents, neighbors = (
      stages.require(folder, name, config=dict)["config"] for name in ("documents", "neighbors")
    )
    found = {"clip": neighbors["retrieval"]["clip"], **documents["inputs"], **neighbors["inputs"]}
    remedy = f"copy its folder from {trained.folder} to {folder}, and build the bank again"
  expected = {"clip": settings.retrieval.clip, **ids(trained, read)}
  for name, value in expected.items():
    if found[name] != value:
      raise UserError(
        f"--bank {folder} was built with a different {name} than {trained.folder}: {remedy}."
      )
  return bank

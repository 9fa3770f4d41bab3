"""Prepares several jobs in one batch: retrieves documents, and encodes and decodes images."""

# I tokens of an image, H height, W width.

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from cm3leon_jax.data.documents.store import Document
from cm3leon_jax.generation.given_images import given_key
from cm3leon_jax.generation.pipeline import Pipeline
from cm3leon_jax.generation.tasks import PromptLayout
from cm3leon_jax.serving.jobs import Job, Neighbor, OpenJob, Started

Decode = Callable[[Sequence[np.ndarray]], Iterable[np.ndarray]]


def open_jobs(
  pipeline: Pipeline, jobs: Sequence[Job], decode: Decode
) -> list[tuple[OpenJob, Started]]:
  """Retrieves documents for all jobs, encodes their input images, and makes their requests.

  `decode` converts [I] codes of each image to [H, W, 3] uint8.

  Raises:
    UserError: a task is wrong, or no document is found for it.
  """
  layout, tasks = pipeline.layout, [job.task for job in jobs]
  given = pipeline.check(tasks)
  neighbors = pipeline.retrieve(tasks)
  codes = pipeline.codes(given)
  shown_neighbors = described(layout, neighbors, decode)
  opened = []
  for job, found, shown in zip(jobs, neighbors, shown_neighbors, strict=True):
    key = given_key(job.task)
    request = job.task.to_request(layout, codes.get(key), found)
    own = {key: given[key]} if key in given else {}
    is_image = layout.vocab.is_image(request.streams[0])
    started = Started(shown, int((~is_image).sum()), int(is_image.sum()))
    opened.append((OpenJob(job, request, own, codes.get(key), found), started))
  return opened


def described(
  layout: PromptLayout, neighbors: Sequence[Sequence[Document]], decode: Decode
) -> list[tuple[Neighbor, ...]]:
  """Describes the retrieved documents of each job for the client."""
  documents = [document for found in neighbors for document in found]
  images = iter(decode([layout.vocab.image_codes(d.segments[1].tokens) for d in documents]))
  return [
    tuple(
      Neighbor(
        document.key,
        layout.decode(document.segments[0].tokens),
        next(images),
        *(document.source, document.license, document.attribution),
      )
      for document in found
    )
    for found in neighbors
  ]

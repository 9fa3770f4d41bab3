"""Defines the jobs of the engine and their events, and prepares several jobs in one batch."""

# I tokens of an image, H height, W width.

from collections.abc import Callable, Iterable, Sequence
import dataclasses
import functools

import numpy as np

from cm3leon_jax.config.sampling import SamplingConfig
from cm3leon_jax.data.documents.store import Document
from cm3leon_jax.decoding.continuous.buckets import Bucket, bucket_of
from cm3leon_jax.decoding.request import Request
from cm3leon_jax.decoding.result import Result
from cm3leon_jax.errors import UserError
from cm3leon_jax.generation.given_images import given_key
from cm3leon_jax.generation.image_tasks import Edit, InfillImage, TextToImage
from cm3leon_jax.generation.pipeline import Pipeline
from cm3leon_jax.generation.sample import Sample
from cm3leon_jax.generation.tasks import PromptLayout, Task
from cm3leon_jax.generation.text_tasks import Caption, Question
from cm3leon_jax.serving.errors import ApiError
from cm3leon_jax.serving.uploads import png

KNOWN = 256  # Number of retrieved documents whose decoded images are kept.
Decode = Callable[[Sequence[np.ndarray]], Iterable[np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Neighbor:
  """Retrieved document with its decoded caption and image, [H, W, 3] uint8."""

  document: Document
  caption: str
  image: np.ndarray

  @functools.cached_property
  def png(self) -> str:
    """The image as a PNG file in base64."""
    return png(self.image)


@dataclasses.dataclass(frozen=True)
class Started:
  """Event: the job is prepared. Lists retrieved documents and counts the tokens of the prompt."""

  neighbors: tuple[Neighbor, ...]
  text_tokens: int
  image_tokens: int


@dataclasses.dataclass(frozen=True)
class Progress:
  """Event: preview of a sample, either its image with the rows so far, or its text so far."""

  index: int
  rows: int = 0
  image: np.ndarray | None = None
  text: str = ""


@dataclasses.dataclass(frozen=True)
class Finished:
  """Event: a sample is complete. No event follows after the last sample of a job."""

  sample: Sample
  ratios: list[np.ndarray] | None = None  # `Influence.ratios` of each retrieved document.


@dataclasses.dataclass(frozen=True)
class Failed:
  """Event: the job has failed. No event follows."""

  error: ApiError


Event = Started | Progress | Finished | Failed


@dataclasses.dataclass(eq=False)
class Job:
  """Job of the engine for one HTTP request.

  Attributes:
    deliver: called with each event, in the thread of the engine.
    shows_progress: whether `Progress` events are delivered.
    explains: whether `Finished` events have ratios.
    warms_up: whether the engine made the job to compile programs. It is not counted.
    cancelled: whether the client no longer waits for the job.
  """

  task: Task
  num_samples: int
  deliver: Callable[[Event], None]
  shows_progress: bool = False
  explains: bool = False
  warms_up: bool = False
  cancelled: bool = False


@dataclasses.dataclass(eq=False)
class OpenJob:
  """Prepared job: the inputs of its samples, and how many samples have started."""

  job: Job
  request: Request
  given: dict
  codes: np.ndarray | None
  neighbors: tuple[Document, ...]
  begun: int = 0
  bucket: Bucket | None = None
  rows: dict[int, int] = dataclasses.field(default_factory=dict)
  failed: bool = False

  @property
  def waits(self) -> bool:
    return self.begun < self.job.num_samples


def open_jobs(
  pipeline: Pipeline, jobs: Sequence[Job], decode: Decode, known: dict[tuple[str, str], Neighbor]
) -> list[tuple[OpenJob, Started]]:
  """Retrieves documents for all jobs, encodes their input images, and makes their requests.

  `decode` converts [I] codes of each image to [H, W, 3] uint8. `known` keeps the last KNOWN
  retrieved documents, by source and key, whose images need not be decoded again.

  Raises:
    UserError: a task is invalid, or retrieval finds no document for it.
  """
  layout, tasks = pipeline.layout, [job.task for job in jobs]
  given = pipeline.check(tasks)
  neighbors = pipeline.retrieve(tasks)
  codes = pipeline.codes(given)
  opened, described = [], _described(layout, neighbors, decode, known)
  for job, result, shown in zip(jobs, neighbors, described, strict=True):
    key = given_key(job.task)
    request = job.task.to_request(layout, codes.get(key), result)
    own = {key: given[key]} if key in given else {}
    is_image = layout.vocab.is_image(request.streams[0])
    started = Started(shown, int((~is_image).sum()), int(is_image.sum()))
    opened.append((OpenJob(job, request, own, codes.get(key), result), started))
  return opened


def _described(
  layout: PromptLayout, neighbors: Sequence[Sequence[Document]], decode: Decode, known: dict
) -> list[tuple[Neighbor, ...]]:
  """Describes the retrieved documents of each job for the client."""
  documents = {(d.source, d.key): d for found in neighbors for d in found}
  new = {name: d for name, d in documents.items() if name not in known}
  images = decode([layout.vocab.image_codes(d.segments[1].tokens) for d in new.values()])
  for (name, d), image in zip(new.items(), images, strict=True):
    known[name] = Neighbor(d, layout.decode(d.segments[0].tokens), image)
  described = [tuple(known[d.source, d.key] for d in found) for found in neighbors]
  while len(known) > KNOWN:
    del known[next(iter(known))]
  return described


def usual_tasks(pipeline: Pipeline) -> list[Task]:
  """Returns example tasks with the usual kinds and lengths of prompts.

  Their programs are compiled before requests are answered. Longer prompts use a larger bucket.
  Tasks that do not fit into the model's positions are left out.
  """
  layout, sampling = pipeline.layout, pipeline.settings.sampling
  blank = np.full((layout.resolution, layout.resolution, 3), 128, np.uint8)
  caption, retrieve = "a red apple", pipeline.usual_retrieve
  box = (0, 0, layout.resolution // 2, layout.resolution // 2)
  tasks = [
    TextToImage(caption, retrieve=0),
    Caption(image=blank),
    Question(image=blank, prompt="What color is the apple?"),
    Edit(image=blank, prompt="make it blue"),
    InfillImage(image=blank, box=box, prompt=caption),
  ]
  if retrieve and len(pipeline.documents):
    # The caption of a document retrieves at least that document, even if no other is similar.
    known = layout.decode(pipeline.documents[0].segments[0].tokens)
    tasks.insert(0, TextToImage(known, retrieve=retrieve))
  tasks = [dataclasses.replace(task, sampling=sampling) for task in tasks]
  return [task for task in tasks if _fits(layout, task)]


def _fits(layout: PromptLayout, task: Task) -> bool:
  try:
    task.to_request(layout)
  except UserError:
    return False
  return True


def warm_up_jobs(tasks: Sequence[Task], deliver: Callable[[Event], None]) -> list[Job]:
  """Returns jobs that use the programs of tasks: a sample for each, and two of the last image.

  The box of an image is also filled in without a prompt, which needs a bucket of one stream.
  """
  boxes = [dataclasses.replace(t, prompt="") for t in tasks if isinstance(t, InfillImage)]
  tasks = [*tasks, *boxes]
  jobs = [
    Job(task, 1, deliver, shows_progress=True, explains=True, warms_up=True) for task in tasks
  ]
  count = sum(isinstance(task, TextToImage) for task in tasks) or 1
  return [*jobs[:count], dataclasses.replace(jobs[count - 1], num_samples=2), *jobs[count:]]


def usual_buckets(
  pipeline: Pipeline, tasks: Sequence[Task]
) -> dict[Bucket, tuple[Request, SamplingConfig]]:
  """Returns the buckets of tasks, each with a request and its sampling.

  Only the first task may retrieve documents.
  """
  result: dict[Bucket, tuple[Request, SamplingConfig]] = {}
  retrieved = [*pipeline.retrieve(tasks[:1]), *[()] * (len(tasks) - 1)]
  for task, neighbors in zip(tasks, retrieved, strict=True):
    case = task.to_request(pipeline.layout, neighbors=neighbors), task.sampling
    result.setdefault(bucket_of(*case, pipeline.generator), case)
  return result


def finished(
  pipeline: Pipeline, opened: Sequence[OpenJob], results: Sequence[Result]
) -> list[Finished]:
  """Makes the samples of jobs from their results, and explains those whose job asks for it."""
  given = {key: image for one in opened for key, image in one.given.items()}
  samples = pipeline.samples(
    range(len(opened)),
    results,
    [one.job.task for one in opened],
    [one.request for one in opened],
    given,
    [one.neighbors for one in opened],
  )
  return [
    Finished(
      sample,
      [x.ratios for x in sample.explain()] if one.job.explains and sample.neighbors else None,
    )
    for one, sample in zip(opened, samples, strict=True)
  ]

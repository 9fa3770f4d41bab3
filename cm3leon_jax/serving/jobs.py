"""Defines the jobs of the engine and the events that it delivers for them."""

# H height, W width.

from collections.abc import Callable, Mapping
import dataclasses

import numpy as np

from cm3leon_jax.data.documents.store import Document
from cm3leon_jax.decoding.request import Request
from cm3leon_jax.generation.sample import Sample
from cm3leon_jax.generation.tasks import Task
from cm3leon_jax.serving.errors import ApiError


@dataclasses.dataclass(frozen=True)
class Neighbor:
  """Retrieved document with its caption, its image, [H, W, 3] uint8, and its origin."""

  key: str
  caption: str
  image: np.ndarray
  source: str
  license: str
  attribution: str


@dataclasses.dataclass(frozen=True)
class Started:
  """Event: the job is prepared. Lists retrieved documents and counts the tokens of the prompt."""

  neighbors: tuple[Neighbor, ...]
  text_tokens: int
  image_tokens: int


@dataclasses.dataclass(frozen=True)
class Progress:
  """Event: preview of a sample, either the complete rows of its image or its text so far."""

  index: int
  rows: int = 0
  image: np.ndarray | None = None
  text: str = ""


@dataclasses.dataclass(frozen=True)
class Finished:
  """Event: a sample is complete. No event follows after the last sample of a job."""

  sample: Sample


@dataclasses.dataclass(frozen=True)
class Failed:
  """Event: the job has failed. No event follows."""

  error: ApiError


Event = Started | Progress | Finished | Failed


@dataclasses.dataclass(eq=False)
class Job:
  """Work for the engine, made from an HTTP request.

  Attributes:
    deliver: called with each event, in the thread of the engine.
    shows_progress: whether to deliver `Progress` events.
    words: words of task errors -> words for the client, see `tasks.refused`.
    cancelled: whether the client no longer waits for the job.
  """

  task: Task
  num_samples: int
  deliver: Callable[[Event], None]
  shows_progress: bool = False
  words: Mapping[str, str] | None = None
  cancelled: bool = False


@dataclasses.dataclass(eq=False)
class OpenJob:
  """Prepared job: the inputs of its samples, and how many samples have begun and finished."""

  job: Job
  request: Request
  given: dict
  codes: np.ndarray | None
  neighbors: tuple[Document, ...]
  begun: int = 0
  finished: int = 0
  rows: dict[int, int] = dataclasses.field(default_factory=dict)
  failed: bool = False

  @property
  def waits(self) -> bool:
    return self.begun < self.job.num_samples

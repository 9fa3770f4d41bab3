"""Jobs of the engine, and the events that it delivers for them."""

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
  """A retrieved document: its caption, its image [H, W, 3] uint8, where it is from."""

  key: str
  caption: str
  image: np.ndarray
  source: str
  license: str
  attribution: str


@dataclasses.dataclass(frozen=True)
class Started:
  """The job is prepared: what was retrieved, and the number of tokens of its prompt."""

  neighbors: tuple[Neighbor, ...]
  text_tokens: int
  image_tokens: int


@dataclasses.dataclass(frozen=True)
class Progress:
  """A sample so far: the rows of its image that are complete, or its text."""

  index: int
  rows: int = 0
  image: np.ndarray | None = None
  text: str = ""


@dataclasses.dataclass(frozen=True)
class Finished:
  """A sample is complete. Events of its job end when all samples are."""

  sample: Sample


@dataclasses.dataclass(frozen=True)
class Failed:
  """The job has failed; no event follows."""

  error: ApiError


Event = Started | Progress | Finished | Failed


@dataclasses.dataclass(eq=False)
class Job:
  """What a request asks for.

  Attributes:
    task: validated.
    num_samples: of the task.
    deliver: is called with each event, in the thread of the engine.
    shows_progress: wants `Progress`.
    words: see `tasks.refused`.
    cancelled: nobody waits for it any more.
  """

  task: Task
  num_samples: int
  deliver: Callable[[Event], None]
  shows_progress: bool = False
  words: Mapping[str, str] | None = None
  cancelled: bool = False


@dataclasses.dataclass(eq=False)
class OpenJob:
  """A job that is prepared: what its samples are made of, and how many of them have begun."""

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

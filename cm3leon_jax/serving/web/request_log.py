"""Logs one line per request: its path, status and cost, but never its contents."""

import dataclasses
import logging
import re
from urllib.parse import quote

from cm3leon_jax.generation.image_tasks import ImageTask
from cm3leon_jax.generation.tasks import Task
from cm3leon_jax.serving.jobs import Event, Finished

NAME = "cm3leon_jax.serving.requests"
_LOG = logging.getLogger(NAME)
PROBES = frozenset({"/health", "/healthz", "/readyz", "/metrics"})  # Logged at level DEBUG.
LONGEST_PATH = 100
ID_HEADER = "x-request-id"


@dataclasses.dataclass
class Made:
  """Counts of the images and tokens that were generated for a request."""

  images: int = 0
  tokens: int = 0

  def add(self, task: Task, event: Event) -> None:
    """Counts the sample of a `Finished` event."""
    if isinstance(event, Finished):
      self.images += isinstance(task, ImageTask)
      self.tokens += len(event.sample.tokens)


def line(
  method: str, path: str, status: int, seconds: float, made: Made, request_id: str = ""
) -> str:
  r"""Formats a request as one log line. Text from a client cannot start a new line.

  >>> line("POST", "/v1/images/generations", 200, 1.5, Made(2, 512), "7f3a")
  'POST /v1/images/generations status=200 seconds=1.500 images=2 tokens=512 id=7f3a'
  >>> line("GET", "/a\nb", 404, 0.001, Made(), "two words")
  'GET /a%0Ab status=404 seconds=0.001'
  """
  words = [quote(method, safe="")[:16], quote(path)[:LONGEST_PATH]]
  words += [f"status={status}", f"seconds={seconds:.3f}"]
  words += [f"images={made.images}"] * bool(made.images)
  words += [f"tokens={made.tokens}"] * bool(made.tokens)
  if re.fullmatch(r"[\w.:/+=-]{1,128}", request_id, re.ASCII):
    words.append(f"id={request_id}")
  return " ".join(words)


def log(
  method: str, path: str, status: int, seconds: float, made: Made, request_id: str = ""
) -> None:
  """Logs a request that has ended; see `line`."""
  level = logging.DEBUG if path in PROBES else logging.INFO
  if _LOG.isEnabledFor(level):
    _LOG.log(level, "%s", line(method, path, status, seconds, made, request_id))


def show() -> None:
  """Sets the level INFO, at which requests are logged. The default level is WARNING."""
  _LOG.setLevel(logging.INFO)

"""Formats the events of a job as JSON or as server-sent events of the API."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
import dataclasses
import json
import time
from typing import Any
import uuid

import numpy as np

from cm3leon_jax.generation.sample import Sample
from cm3leon_jax.generation.tasks import Task
from cm3leon_jax.serving.jobs import Event, Finished, Neighbor, Progress, Started
from cm3leon_jax.serving.uploads import png
from cm3leon_jax.vocab import VocabLayout


@dataclasses.dataclass
class Seen:
  """What the events of a job have shown so far."""

  started: Started = Started((), 0, 0)  # noqa: RUF009 (frozen)
  tokens: int = 0

  def take(self, event: Event) -> None:
    """Records an event."""
    if isinstance(event, Started):
      self.started = event
    elif isinstance(event, Finished):
      self.tokens += len(event.sample.tokens)


def neighbors(found: tuple[Neighbor, ...]) -> list[dict[str, str]]:
  """Describes retrieved documents with their images and origins."""
  names = ("source", "license", "attribution")
  return [
    {"key": one.document.key, "caption": one.caption}
    | {name: getattr(one.document, name) for name in names}
    | {"b64_json": one.png}
    for one in found
  ]


def described(event: Finished) -> dict[str, Any]:
  """Returns the fields of a complete image, with `ratios` if the request asked to explain it."""
  result = {"seed": event.sample.seed, "clip_score": event.sample.clip_score}
  if event.ratios is None:
    return result
  return {**result, "ratios": [x.astype(float).round(3).tolist() for x in event.ratios]}


def server_event(data: dict | str, name: str = "") -> str:
  """Formats a server-sent event."""
  text = data if isinstance(data, str) else json.dumps(data)
  return f"{f'event: {name}{chr(10)}' if name else ''}data: {text}\n\n"


@dataclasses.dataclass
class ImageAnswer:
  """Formats the answer to a request for images.

  Attributes:
    prefix: start of the event types, "image_generation" or "image_edit".
    partial_images: largest number of partial images per sample; None means one per row.
  """

  task: Task
  resolution: int
  total_rows: int
  prefix: str = "image_generation"
  partial_images: int | None = None

  def __post_init__(self) -> None:
    self._created, self._seen = int(time.time()), Seen()
    self._shown: dict[int, list[int]] = {}

  def _about(self) -> dict[str, Any]:
    size = f"{self.resolution}x{self.resolution}"
    return {"background": "opaque", "output_format": "png", "quality": "high", "size": size}

  def _usage(self, tokens: int) -> dict[str, Any]:
    started = self._seen.started
    prompt = started.text_tokens + started.image_tokens
    return {
      "input_tokens": prompt,
      "input_tokens_details": {
        "image_tokens": started.image_tokens,
        "text_tokens": started.text_tokens,
      },
      "output_tokens": tokens,
      "total_tokens": prompt + tokens,
    }

  async def whole(self, events: AsyncIterator[Event]) -> dict[str, Any]:
    """Waits until all samples are complete, and returns the answer."""
    finished = []
    async for event in events:
      self._seen.take(event)
      if isinstance(event, Finished):
        finished.append(event)
    finished.sort(key=lambda event: event.sample.index)
    return await asyncio.to_thread(self._body, finished)

  def _body(self, finished: list[Finished]) -> dict[str, Any]:
    """Creates the answer. Runs in a thread, like `_partial` and `_completed`, to encode images."""
    return {
      "created": self._created,
      "data": [{"b64_json": png(e.sample.segments[0]), **described(e)} for e in finished],
      **self._about(),
      "usage": self._usage(self._seen.tokens),
      "neighbors": neighbors(self._seen.started.neighbors),
    }

  async def stream(self, events: AsyncIterator[Event]) -> AsyncGenerator[str, None]:
    """Yields one event per partial image and one per complete image."""
    async for event in events:
      self._seen.take(event)
      if isinstance(event, Progress) and self._is_due(event):
        yield await asyncio.to_thread(self._partial, event)
      elif isinstance(event, Finished):
        yield await asyncio.to_thread(self._completed, event)

  def _partial(self, event: Progress) -> str:
    shown = self._shown.setdefault(event.index, [])
    assert event.image is not None
    data: dict[str, Any] = {
      "partial_image_index": len(shown),
      "rows": event.rows,
      "of_rows": self.total_rows,
    }
    if not shown:
      data["neighbors"] = neighbors(self._seen.started.neighbors)
    shown.append(event.rows)
    return self._event("partial_image", event.image, event.index, data)

  def _completed(self, event: Finished) -> str:
    sample = event.sample
    data = {
      "usage": self._usage(len(sample.tokens)),
      **described(event),
      "neighbors": neighbors(self._seen.started.neighbors),
    }
    return self._event("completed", sample.segments[0], sample.index, data)

  def _is_due(self, event: Progress) -> bool:
    """Returns whether to send a partial image. The `partial_images` images are evenly spaced."""
    if event.rows >= self.total_rows:
      return False  # The complete image follows.
    if self.partial_images is None:
      return True
    shown = self._shown.get(event.index, [])
    next_rows = (len(shown) + 1) * self.total_rows / (self.partial_images + 1)
    return len(shown) < self.partial_images and event.rows >= next_rows

  def _event(self, kind: str, image: np.ndarray, index: int, data: dict[str, Any]) -> str:
    name = f"{self.prefix}.{kind}"
    shared = {"type": name, "created_at": self._created, "index": index, **self._about()}
    return server_event({**shared, "b64_json": png(image), **data}, name)


@dataclasses.dataclass
class ChatAnswer:
  """Formats the answer for texts. With `include_usage`, the last chunk has the token counts."""

  task: Task
  vocab: VocabLayout
  model: str
  num_samples: int
  include_usage: bool = False

  def __post_init__(self) -> None:
    self._created, self._seen = int(time.time()), Seen()
    self._id = f"chatcmpl-{uuid.uuid4().hex}"

  def _usage(self) -> dict[str, int]:
    started = self._seen.started
    prompt = started.text_tokens + started.image_tokens
    tokens = self._seen.tokens
    return {
      "prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens
    }  # fmt: skip

  def _reason(self, sample: Sample) -> str:
    """Returns "length" if a text has reached its maximum length, otherwise "stop"."""
    ends = np.flatnonzero(sample.tokens == self.vocab.eoss)
    lengths = [(text >= self.vocab.num_special).sum() for text in np.split(sample.tokens, ends)]
    return "length" if max(lengths) >= self.task.length else "stop"

  async def whole(self, events: AsyncIterator[Event]) -> dict[str, Any]:
    """Waits until all samples are complete, and returns the answer."""
    choices = []
    async for event in events:
      self._seen.take(event)
      if isinstance(event, Finished):
        sample = event.sample
        message = {"role": "assistant", "content": sample.text, "refusal": None}
        reason = self._reason(sample)
        choices.append(
          {"index": sample.index, "message": message, "logprobs": None, "finish_reason": reason}
        )
    return {
      "id": self._id,
      "object": "chat.completion",
      "created": self._created,
      "model": self.model,
      "choices": sorted(choices, key=lambda choice: choice["index"]),
      "usage": self._usage(),
      "neighbors": neighbors(self._seen.started.neighbors),
    }

  async def stream(self, events: AsyncIterator[Event]) -> AsyncGenerator[str, None]:
    """Yields a chunk for each new piece of a text. The joined pieces equal the texts of `whole`."""
    sent: dict[int, str] = {}
    async for event in events:
      self._seen.take(event)
      if isinstance(event, Started):
        for index in range(self.num_samples):
          yield self._chunk(index, {"role": "assistant", "content": ""})
      elif isinstance(event, Progress):
        before = sent.setdefault(event.index, "")
        if event.text.startswith(before) and event.text != before:
          sent[event.index] = event.text
          yield self._chunk(event.index, {"content": event.text[len(before) :]})
      elif isinstance(event, Finished):
        sample = event.sample
        before = sent.get(sample.index, "")
        if sample.text != before:
          yield self._chunk(sample.index, {"content": sample.text.removeprefix(before)})
        yield self._chunk(sample.index, {}, self._reason(sample))
    if self.include_usage:
      yield server_event({**self._head(), "choices": [], "usage": self._usage()})
    yield server_event("[DONE]")

  def _head(self) -> dict[str, Any]:
    return {
      "id": self._id, "object": "chat.completion.chunk", "created": self._created,
      "model": self.model,
    }  # fmt: skip

  def _chunk(self, index: int, delta: dict[str, str], reason: str | None = None) -> str:
    choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}
    return server_event({**self._head(), "choices": [choice]})

"""Streams server-sent events, and detects clients that disconnect before their answer."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
import contextlib
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from cm3leon_jax.serving.errors import ApiError
from cm3leon_jax.serving.jobs import Event
from cm3leon_jax.serving.web.answers import server_event

T = TypeVar("T")
QUIET_SECONDS = 10.0  # Silence after which a comment is sent: proxies close idle streams.


class EventStream(StreamingResponse):
  """Server-sent events of a job. The job is cancelled when the client disconnects."""

  def __init__(
    self,
    write: Callable[[AsyncIterator[Event]], AsyncGenerator[str, None]],
    first: Event,
    events: AsyncGenerator[Event, None],
  ):
    self._write, self._first, self._events = write, first, events
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    self._body = self._texts()
    super().__init__(self._body, media_type="text/event-stream", headers=headers)

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    try:
      await super().__call__(scope, receive, send)
    finally:
      await self._body.aclose()
      await self._events.aclose()

  async def _replayed(self) -> AsyncIterator[Event]:
    yield self._first
    async for event in self._events:
      yield event

  async def _texts(self) -> AsyncGenerator[str, None]:
    texts = self._write(self._replayed())
    waiting = None
    try:
      while True:
        waiting = waiting or asyncio.ensure_future(anext(texts))
        done, _ = await asyncio.wait({waiting}, timeout=QUIET_SECONDS)
        if not done:
          yield ": working\n\n"
          continue
        text, waiting = waiting.result(), None
        yield text
    except StopAsyncIteration:
      pass
    except ApiError as error:
      yield server_event(error.body(), "error")
    finally:
      if waiting is not None:
        waiting.cancel()
        with contextlib.suppress(BaseException):
          await waiting
      await texts.aclose()


async def unless_gone(request: Request, coroutine: Awaitable[T]) -> T | None:
  """Awaits a result, or returns None if the client disconnects. Read the request's body first."""
  task = asyncio.ensure_future(coroutine)
  gone = asyncio.ensure_future(_wait_until_gone(request))
  try:
    await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
    return task.result() if task.done() else None
  finally:
    for future in (task, gone):
      future.cancel()
    await asyncio.gather(task, gone, return_exceptions=True)


async def _wait_until_gone(request: Request) -> None:
  while (await request.receive())["type"] != "http.disconnect":
    pass

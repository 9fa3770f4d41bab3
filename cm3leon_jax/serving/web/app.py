"""Defines the HTTP application: routes of the OpenAI API, health, metrics and one page."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Iterator
import contextlib
import importlib.resources
import re
import time
from typing import Any, TypeVar

import numpy as np
from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from cm3leon_jax.errors import short
from cm3leon_jax.generation.image_tasks import ImageTask
from cm3leon_jax.generation.tasks import Task
from cm3leon_jax.serving import schemas, tasks
from cm3leon_jax.serving.engine import Engine
from cm3leon_jax.serving.errors import QUEUE_FULL, ApiError, internal, refusal
from cm3leon_jax.serving.jobs import Event, Failed, Finished, Job
from cm3leon_jax.serving.web.answers import ChatAnswer, ImageAnswer
from cm3leon_jax.serving.web.decoders import Decoders
from cm3leon_jax.serving.web.limits import Guard, Limits
from cm3leon_jax.serving.web.metrics import CONTENT_TYPE, Metrics
from cm3leon_jax.serving.web.streams import EventStream, unless_gone

T = TypeVar("T")
GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
CHAT, MODELS = "/v1/chat/completions", "/v1/models"
PAGE = {
  "": ("index.html", "text/html"),
  "app.css": ("app.css", "text/css"),
  "app.js": ("app.js", "text/javascript"),
  "canvas.js": ("canvas.js", "text/javascript"),
}


class Server:
  """Answers the requests to one model."""

  def __init__(self, engine: Engine, name: str, limits: Limits):
    self.engine, self.name, self.limits = engine, name, limits
    self.metrics = Metrics(engine)
    self._layout = engine.pipeline.layout
    self._started = int(time.time())
    self._decoders = Decoders()

  def app(self, local: bool) -> Guard:
    """Returns the application. `local` says whether the server listens on a loopback address."""
    routes = [
      Route(GENERATIONS, self._generations, methods=["POST"]),
      Route(EDITS, self._edits, methods=["POST"]),
      Route(CHAT, self._chat, methods=["POST"]),
      Route(MODELS, self._models),
      Route(MODELS + "/{name}", self._model),
      Route("/health", self._health),
      Route("/healthz", self._health),
      Route("/readyz", self._ready),
      Route("/metrics", self._metrics),
      *(Route(f"/{name}", _page) for name in PAGE),
    ]
    handlers: Any = {ApiError: self._api_error, ClientDisconnect: _nobody}
    handlers |= {HTTPException: _http_error, Exception: _unknown_error}
    app = Starlette(routes=routes, exception_handlers=handlers, lifespan=self._lifespan)
    endpoints = [route.path for route in routes]
    return Guard(app, self.limits, self.metrics, endpoints, local)

  @contextlib.asynccontextmanager
  async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
    yield
    await self._decoders.close()

  async def _generations(self, request: Request) -> Response:
    body = schemas.read(schemas.Generation, await self._json(request))
    self._check(body)
    with self._place(request):
      task = await asyncio.to_thread(tasks.generation, self.engine.pipeline, body)
      return await self._images(request, body, task, "image_generation")

  async def _edits(self, request: Request) -> Response:
    fields, files = await self._form(request)
    body = schemas.read(schemas.EditBody, fields, strict=False)
    self._check(body)
    if "image" not in files:
      raise ApiError(400, "image is required: send a file.", "image", "missing_required_parameter")
    with self._place(request):
      image = await self._decoded(request, "image", files["image"])
      task = await asyncio.to_thread(tasks.edit, self.engine.pipeline, body, image)
      return await self._images(request, body, task, "image_edit")

  async def _chat(self, request: Request) -> Response:
    body = schemas.read(schemas.Chat, await self._json(request))
    self._check(body)
    text, sent = tasks.content(body.messages)
    image: np.ndarray | None = None
    with self._place(request):
      if sent is not None:
        image = await self._decoded(request, "image_url.url", sent)
      del sent  # Free the memory of the upload before the answer is computed.
      task = await asyncio.to_thread(tasks.chat, self.engine.pipeline, body, text, image)
      usage = body.stream_options.include_usage
      answer = ChatAnswer(task, self._layout.vocab, body.model or self.name, body.n, usage)
      return await self._answer(request, body, task, answer)

  @contextlib.contextmanager
  def _place(self, request: Request) -> Iterator[None]:
    """Reserves a place in the queue and starts the time limit. Raises ApiError for a full queue."""
    request.state.ends = asyncio.get_running_loop().time() + self.limits.seconds
    with self.engine.place() as place:
      request.state.place = place
      yield

  async def _decoded(self, request: Request, param: str, image: bytes) -> np.ndarray:
    """Decodes an image. Raises ApiError if it is invalid, or ClientDisconnect."""
    side, pixels = self._layout.resolution, self.limits.most_pixels
    decoding = self._decoders.decode(image, resolution=side, most_pixels=pixels, param=param)
    found = await self._in_time(request, unless_gone(request, decoding))
    if found is None:
      raise ClientDisconnect
    return found

  async def _in_time(self, request: Request, coroutine: Awaitable[T]) -> T:
    """Awaits a coroutine. Raises ApiError when the time limit of the request is over."""
    seconds = request.state.ends - asyncio.get_running_loop().time()
    try:
      # In Python 3.11, `asyncio.wait_for` may ignore a cancellation.
      async with asyncio.timeout(seconds):
        return await coroutine
    except TimeoutError as error:
      seconds = f"{self.limits.seconds:g}"
      message = f"the answer took more than {seconds} s: request fewer samples, or try later."
      raise ApiError(504, message, code="timeout") from error

  def _check(self, body: schemas.Body) -> None:
    """Raises ApiError for an unknown model or size, or for too many samples or documents."""
    if body.model not in (None, "", self.name):
      message = f"{self._listed}: name it, or leave model out."
      raise ApiError(404, message, "model", "model_not_found")
    if body.n > self.limits.most_samples:
      raise refusal(f"n is {short(body.n)}; it must be at most {self.limits.most_samples}.", "n")
    if (body.retrieve or 0) > self._most_retrieve:
      retrieve = short(body.retrieve)
      raise refusal(
        f"retrieve is {retrieve}; it must be at most {self._most_retrieve}.", "retrieve"
      )
    side = self._layout.resolution
    if isinstance(body, schemas.ImageBody) and body.size not in ("auto", f"{side}x{side}"):
      raise refusal(f"size must be auto or {side}x{side}, which this model generates.", "size")

  @property
  def _listed(self) -> str:
    """Start of a sentence that names the model."""
    return f"this server has only the model '{self.name}'"

  @property
  def _most_retrieve(self) -> int:
    """Largest `retrieve`: twice the number of neighbors in training. More documents rarely fit."""
    pipeline = self.engine.pipeline
    return min(2 * pipeline.usual_retrieve, pipeline.settings.retrieval.max_candidates)

  async def _images(
    self, request: Request, body: schemas.ImageBody, task: ImageTask, prefix: str
  ) -> Response:
    rows = task.total_rows(self._layout)
    answer = ImageAnswer(task, self._layout.resolution, rows, prefix, body.partial_images)
    return await self._answer(request, body, task, answer)

  async def _answer(
    self, request: Request, body: schemas.Body, task: Task, answer: ImageAnswer | ChatAnswer
  ) -> Response:
    """Submits the task to the engine. Answers when the task is done, or with a stream of events."""
    events = self._events(request, task, body)
    if not body.stream:
      async with contextlib.aclosing(events):
        found = await unless_gone(request, answer.whole(events))
      return Response(status_code=499) if found is None else JSONResponse(found)
    # Await the first event, so that an error before it is sent with its own HTTP status.
    first = await unless_gone(request, anext(events))
    if first is None:
      await events.aclose()
      return Response(status_code=499)
    return EventStream(answer.stream, first, events)

  async def _events(
    self, request: Request, task: Task, body: schemas.Body
  ) -> AsyncGenerator[Event, None]:
    """Yields the events of a job, or raises its ApiError. Cancels the job when closed."""
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[Event] = asyncio.Queue()

    def deliver(event: Event) -> None:
      with contextlib.suppress(RuntimeError):  # Raised if the event loop has ended.
        loop.call_soon_threadsafe(queue.put_nowait, event)

    explains = isinstance(body, schemas.Generation) and body.explain
    job = Job(task, body.n, deliver, body.stream, explains)
    self.engine.submit(job, request.state.place)
    try:
      remaining = body.n
      while remaining:
        event = await self._in_time(request, queue.get())
        if isinstance(event, Failed):
          raise event.error
        remaining -= isinstance(event, Finished)
        yield event
    finally:
      self.engine.cancel(job)

  async def _read(self, coroutine: Awaitable[T]) -> T:
    """Awaits a body. Raises ApiError if the client sends the body too slowly."""
    try:
      return await asyncio.wait_for(coroutine, self.limits.body_seconds)
    except TimeoutError as error:
      seconds = f"{self.limits.body_seconds:g}"
      raise ApiError(408, f"the body took more than {seconds} s.", code="body_timeout") from error

  async def _json(self, request: Request) -> dict:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
      raise ApiError(415, "the body must be JSON: send Content-Type: application/json.")
    return schemas.read_json(await self._read(request.body()))

  async def _form(self, request: Request) -> tuple[dict[str, str], dict[str, bytes]]:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data":
      raise ApiError(415, "the body must be a form: send Content-Type: multipart/form-data.")
    form = await self._read(request.form(max_files=4, max_fields=40, max_part_size=2**16))
    fields: dict[str, str] = {}
    files: dict[str, bytes] = {}
    async with contextlib.AsyncExitStack() as stack:
      stack.push_async_callback(form.close)
      for key, value in form.multi_items():
        name = key.removesuffix("[]")
        if name in (*fields, *files):
          raise refusal(f"{name} is given twice; this model takes only one.", name)
        if not isinstance(value, UploadFile):
          fields[name] = value
        elif name == "image":
          files[name] = await value.read()
        else:
          message = f"there is no file '{name[:80]}' here: the only file is image."
          raise ApiError(400, message, name[:80], "unknown_parameter")
    return fields, files

  async def _models(self, _: Request) -> Response:
    return JSONResponse({"object": "list", "data": [self._described()]})

  async def _model(self, request: Request) -> Response:
    if request.path_params["name"] != self.name:
      raise ApiError(404, f"{self._listed}.", "model", "model_not_found")
    return JSONResponse(self._described())

  def _described(self) -> dict[str, Any]:
    pipeline = self.engine.pipeline
    sampling, layout = pipeline.settings.sampling, self._layout
    names = ("guidance", "temperature", "top_p", "top_k", "image_guidance", "edit_guidance")
    return {
      "id": self.name,
      "object": "model",
      "created": self._started,
      "owned_by": "cm3leon_jax",
      "resolution": layout.resolution,
      "rows": layout.side,
      "most_samples": self.limits.most_samples,
      "retrieve": pipeline.usual_retrieve,
      "most_retrieve": self._most_retrieve,
      "sampling": {name: getattr(sampling, name) for name in names},
    }

  async def _api_error(self, _: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    if error.code == QUEUE_FULL:
      error.headers["Retry-After"] = str(self.metrics.retry_seconds())
    return JSONResponse(error.body(), error.status, error.headers)

  async def _health(self, _: Request) -> Response:
    if self.engine.failure is not None:
      return PlainTextResponse("failed\n", 500)
    return PlainTextResponse("ok\n")

  async def _ready(self, _: Request) -> Response:
    ready = self.engine.is_ready
    return PlainTextResponse("ready\n" if ready else "compiling\n", 200 if ready else 503)

  async def _metrics(self, _: Request) -> Response:
    return Response(self.metrics.text(), media_type=CONTENT_TYPE)


async def _page(request: Request) -> Response:
  """Serves a file of the web page. A client can get only the files that PAGE lists."""
  name, kind = PAGE[request.url.path.strip("/")]
  folder = importlib.resources.files("cm3leon_jax.serving") / "page"
  headers = {"Cache-Control": "no-cache"}
  return Response((folder / name).read_bytes(), media_type=kind, headers=headers)


async def _http_error(_: Request, error: Exception) -> Response:
  """Answers errors of Starlette: an unknown path, a wrong method, an invalid form."""
  assert isinstance(error, HTTPException)
  own = ApiError(error.status_code, re.sub(r"\s+", " ", str(error.detail))[:200])
  return JSONResponse(own.body(), error.status_code, dict(error.headers or {}))


async def _unknown_error(_: Request, error: Exception) -> Response:
  """Answers unknown errors. Starlette raises them again afterwards, so that uvicorn logs them."""
  return JSONResponse(internal().body(), 500)


async def _nobody(_: Request, error: Exception) -> Response:
  return Response(status_code=499)  # The client disconnected while it sent its body.

"""Serves an engine in a thread of the tests, and checks every response."""

import base64
import io
import json
import threading
import time

import httpx
import numpy as np
from PIL import Image

from cm3leon_jax.serving.engine import Engine
from cm3leon_jax.serving.web.app import Server
from cm3leon_jax.serving.web.limits import HEADERS, Limits
from cm3leon_jax.serving.web.server import configured, listen


class Live:
  """Server on a free port of 127.0.0.1.

  Attributes:
    url: base URL without a final slash.
    opened: listening socket.
    http: HTTP client.
  """

  def __init__(
    self,
    engine: Engine,
    limits: Limits,
    name: str = "tiny",
    secret: str = "/assets/models",
    connections: int = 64,
    unread_seconds: float = 30,
  ):
    self._connections, self._unread_seconds = connections, unread_seconds
    self._app = Server(engine, name, limits).app(local=True)
    self._secret = secret

  def __enter__(self) -> "Live":
    self.opened = listen("127.0.0.1", 0, self._unread_seconds)
    self.port = self.opened.getsockname()[1]
    self.url = f"http://127.0.0.1:{self.port}"
    self._server = configured(self._app, self._connections, stop_seconds=60)
    self._thread = threading.Thread(target=self._server.run, args=([self.opened],))
    self._thread.start()
    hooks = {"response": [self._check]}
    self.http = httpx.Client(base_url=self.url, timeout=120, event_hooks=hooks)
    while not self._server.started:
      time.sleep(0.01)
    return self

  def __exit__(self, *_) -> None:
    self.http.close()
    self._server.should_exit = True
    self._thread.join(90)  # Stopping may take the 60 seconds of `stop_seconds`.
    assert not self._thread.is_alive()

  def _check(self, answer: httpx.Response) -> None:
    answer.read()
    assert self._secret not in answer.text
    assert "Traceback" not in answer.text
    assert not [name for name in HEADERS if name not in answer.headers]
    assert "access-control-allow-origin" not in answer.headers
    if answer.status_code >= 400 and answer.headers["content-type"] == "application/json":
      assert answer.json()["error"].keys() == {"message", "type", "param", "code"}

  def generate(self, **body) -> httpx.Response:
    return self.http.post("/v1/images/generations", json=body)

  def edit(self, image: bytes, **fields) -> httpx.Response:
    files = {"image": ("a.png", image, "image/png")}
    return self.http.post("/v1/images/edits", files=files, data=fields)

  def chat(self, content, **body) -> httpx.Response:
    messages = [{"role": "user", "content": content}]
    return self.http.post("/v1/chat/completions", json={"messages": messages, **body})

  def gauge(self, name: str) -> float:
    lines = self.http.get("/metrics").text.splitlines()
    [line] = [line for line in lines if line.startswith(f"cm3leon_serve_{name} ")]
    return float(line.split()[1])

  def wait_for(self, name: str, value: float, seconds: float = 30) -> None:
    ends = time.monotonic() + seconds
    while (found := self.gauge(name)) != value:
      assert time.monotonic() < ends, f"{name} is {found}, not {value}, after {seconds} s"
      time.sleep(0.02)


def error(answer: httpx.Response) -> tuple[int, str]:
  return answer.status_code, answer.json()["error"]["message"]


def events(answer: httpx.Response) -> list[dict]:
  """Returns the data of the server-sent events in a response."""
  lines = [line for line in answer.text.splitlines() if line.startswith("data: {")]
  return [json.loads(line.removeprefix("data: ")) for line in lines]


def pixels(base64_png: str) -> np.ndarray:
  with Image.open(io.BytesIO(base64.b64decode(base64_png))) as image:
    assert image.format == "PNG"
    return np.asarray(image.convert("RGB"))


def image(seed: int, size: tuple[int, int] = (8, 8)) -> Image.Image:
  shape = (size[1], size[0], 3)
  return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))


def png(image: Image.Image) -> bytes:
  buffer = io.BytesIO()
  image.save(buffer, "PNG")
  return buffer.getvalue()


def data_url(image: Image.Image) -> str:
  return f"data:image/png;base64,{base64.b64encode(png(image)).decode()}"


def about(image: Image.Image, text: str = "") -> list[dict]:
  """Returns the content of a chat message with an image, and optionally a text."""
  parts = [{"type": "image_url", "image_url": {"url": data_url(image)}}]
  return parts + ([{"type": "text", "text": text}] if text else [])

"""Starts a server for `benchmarks.golden`, and sends requests to it."""

import logging
import pathlib
import socket
import subprocess
import time

import httpx

from benchmarks.golden_digests import of_value

START_SECONDS = 900.0
logging.getLogger("httpx").setLevel(logging.WARNING)  # Logs no requests.
CHANGING = ("created", "id")  # Fields of a response with times and random ids.


class Server:
  """Context manager that starts `cm3leon serve`, waits until it is ready, and stops it on exit."""

  def __init__(self, command: list[str], folder: pathlib.Path, environment: dict[str, str]):
    with socket.socket() as free:
      free.bind(("127.0.0.1", 0))
      port = free.getsockname()[1]
    self._client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=600)
    self._log = folder / "serve.log"
    with self._log.open("w") as log:
      self._process = subprocess.Popen(
        [*command, f"--port={port}"], cwd=folder, env=environment, stdout=log, stderr=log
      )

  def __enter__(self):
    end = time.monotonic() + START_SECONDS
    while not self._is_ready():
      if self._process.poll() is not None or time.monotonic() > end:
        self._process.kill()
        raise SystemExit(f"the server did not start:\n{self._log.read_text()[-2_000:]}")
      time.sleep(0.5)
    return self

  def __exit__(self, *_):
    self._client.close()
    self._process.terminate()
    self._process.wait(timeout=120)

  def _is_ready(self) -> bool:
    try:
      return self._client.get("/readyz").status_code == 200
    except httpx.TransportError:
      return False

  def post(self, path: str, fields: dict, image: bytes | None = None) -> str:
    """Posts JSON, or a form if there is an image; returns a digest of the response."""
    if image is None:
      answer = self._client.post(path, json=fields)
    else:
      files = {"image": ("image.png", image, "image/png")}
      answer = self._client.post(path, data=fields, files=files)
    if answer.status_code != 200:
      raise SystemExit(f"{path} was answered with {answer.status_code}: {answer.text[:500]}")
    return of_value({k: v for k, v in answer.json().items() if k not in CHANGING})

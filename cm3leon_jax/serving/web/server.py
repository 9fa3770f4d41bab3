"""Runs the application with uvicorn in one process until SIGTERM or Ctrl-C."""

import asyncio
from collections.abc import Callable
import copy
import functools
import signal
import socket
import threading
from typing import Any, cast

import h11
from starlette.types import ASGIApp
import uvicorn

from cm3leon_jax.errors import UserError
from cm3leon_jax.serving.engine import Engine
from cm3leon_jax.serving.web.app import Server
from cm3leon_jax.serving.web.limits import Limits, is_loopback

BACKLOG = 1024
UNREAD_SECONDS = 30.0
SMALL_PIECE, MOST_SMALL = 256, 1_000
HEADER_BYTES = 2**16  # Default of uvicorn.
# Time limit for headers, from the start of the connection or from the first byte of the request.
HEADER_SECONDS = 30.0
OPEN = (h11.IDLE, h11.SEND_BODY)  # States of a client whose request is not complete.


def listen(host: str, port: int, unread_seconds: float = UNREAD_SECONDS) -> socket.socket:
  """Opens the port.

  Args:
    port: port; 0 selects a free port.
    unread_seconds: on Linux, a connection is closed if the client does not read its answer for this
      many seconds.

  Raises:
    UserError: the port is taken, or the address does not belong to this machine.
  """
  family = socket.AF_INET6 if ":" in host else socket.AF_INET
  opened = socket.socket(family)
  opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
  if hasattr(socket, "TCP_USER_TIMEOUT"):  # Accepted connections inherit this option: tcp(7).
    milliseconds = int(1000 * unread_seconds)
    opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
  try:
    opened.bind((host, port))
  except OSError as error:
    opened.close()
    raise UserError(
      f"--host={host} --port={port} cannot be opened ({error.strerror or error}): name another "
      "--port, or end the program that uses it."
    ) from error
  return opened


class Guard(asyncio.Protocol):
  """Passes the data of a connection to uvicorn's protocol, after parsing the requests itself.

  Closes a connection whose headers take more than HEADER_SECONDS, for which uvicorn would wait
  forever. Refuses a body with more than MOST_SMALL pieces below SMALL_PIECE bytes: the server reads
  one piece at a time, and one byte takes as long as thousands, so such a body would delay all other
  requests.
  """

  def __init__(self, protocol: Callable[..., asyncio.Protocol], **arguments: Any):
    """`protocol` is uvicorn's class, and `arguments` are those that uvicorn passes to it."""
    self._inner = protocol(**arguments)
    self._requests: h11.Connection | None = h11.Connection(h11.SERVER, HEADER_BYTES)
    self._small = 0
    self._timer: asyncio.TimerHandle | None = None

  def connection_made(self, transport: asyncio.BaseTransport) -> None:
    self._transport = cast("asyncio.Transport", transport)
    self._inner.connection_made(transport)
    self._start_timer()

  def data_received(self, data: bytes) -> None:
    self._follow(data)
    if self._small > MOST_SMALL:
      self._transport.write(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")
      self._transport.close()
      return
    if self._requests is None or self._requests.their_state is not h11.IDLE:
      self._stop_timer()  # The headers are complete or invalid.
    elif self._timer is None:
      self._start_timer()
    self._inner.data_received(data)

  def _follow(self, data: bytes) -> None:
    """Counts the small pieces of the current body."""
    if self._requests is not None and self._requests.their_state not in OPEN:  # A new request.
      data = self._requests.trailing_data[0] + data
      self._requests, self._small = h11.Connection(h11.SERVER, HEADER_BYTES), 0
    try:
      if self._requests is not None:
        self._requests.receive_data(data)
        while not isinstance(event := self._requests.next_event(), type):
          self._small += isinstance(event, h11.Data) and len(event.data) < SMALL_PIECE
    except h11.RemoteProtocolError:  # uvicorn finds the same error, and answers.
      self._requests = None

  def eof_received(self) -> bool | None:
    return self._inner.eof_received()

  def pause_writing(self) -> None:
    self._inner.pause_writing()

  def resume_writing(self) -> None:
    self._inner.resume_writing()

  def connection_lost(self, exc: Exception | None) -> None:
    self._stop_timer()
    self._inner.connection_lost(exc)

  def _start_timer(self) -> None:
    loop = asyncio.get_running_loop()
    self._timer = loop.call_later(HEADER_SECONDS, self._transport.close)

  def _stop_timer(self) -> None:
    if self._timer is not None:
      self._timer.cancel()
      self._timer = None


def url(host: str, port: int) -> str:
  """Returns the address of the page."""
  return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


def configured(app: ASGIApp, connections: int, stop_seconds: int) -> uvicorn.Server:
  """Returns a uvicorn server for an application.

  Args:
    connections: largest number of connections, including idle ones. More connections are answered
      with status 503.
    stop_seconds: time limit for running requests when the server stops.
  """
  log_config = copy.deepcopy(uvicorn.config.LOGGING_CONFIG)  # One line per request.
  log_config["handlers"]["access"]["stream"] = "ext://sys.stderr"
  log_config["loggers"]["uvicorn.error"]["level"] = "WARNING"
  usual = uvicorn.Config(app, http="h11", log_config=None, lifespan="off", ws="none")
  usual.load()
  config = uvicorn.Config(
    app,
    http=cast("Any", functools.partial(Guard, usual.http_protocol_class)),
    loop="asyncio",  # uvloop would call the fork handlers of JAX when it starts a process.
    log_config=log_config,
    server_header=False,
    lifespan="on",
    ws="none",
    backlog=BACKLOG,
    limit_concurrency=connections + 1,  # uvicorn rejects the connection that reaches the limit.
    timeout_keep_alive=30,
    timeout_graceful_shutdown=stop_seconds,
  )
  return uvicorn.Server(config)


def serve(
  engine: Engine, name: str, limits: Limits, host: str, opened: socket.socket, stop_seconds: int
) -> None:
  """Serves until a signal arrives. Running requests then have `stop_seconds` to finish.

  Prints one line with the address when the first programs are compiled.

  Args:
    engine: engine whose thread is not started yet.
    opened: socket from `listen`.
    stop_seconds: time limit for running requests, and for the engine to finish its chunk.

  Raises:
    RuntimeError: the engine failed.
  """
  app = Server(engine, name, limits).app(is_loopback(host))
  server = configured(app, 4 * engine.queue_limit + 64, stop_seconds)
  address = url(host, opened.getsockname()[1])
  # uvicorn stops on these signals, and then raises them again.
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: None)
  engine.start()
  announcer = threading.Thread(target=_announce, args=(engine, server, name, address), daemon=True)
  announcer.start()
  server.run(sockets=[opened])
  engine.close(seconds=stop_seconds if engine.is_warm else 0)  # 0: it still compiles.
  if engine.failure is not None:
    raise RuntimeError("the engine has failed; its error is above.") from engine.failure
  print("stopped.", flush=True)


def _announce(engine: Engine, server: uvicorn.Server, name: str, address: str) -> None:
  """Prints the address when the engine is ready. Stops the server if the engine fails first."""
  if engine.wait_until_ready():
    print(f"serving {name} at {address}", flush=True)
  else:
    server.should_exit = True

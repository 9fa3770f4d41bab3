"""Runs the application with uvicorn in one process until SIGTERM or Ctrl-C."""

import asyncio
import copy
import signal
import socket
import threading
from typing import Any

import h11
from starlette.types import ASGIApp
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from cm3leon_jax.config import UserError
from cm3leon_jax.serving.engine import Engine
from cm3leon_jax.serving.web.app import Server
from cm3leon_jax.serving.web.limits import Limits, is_loopback

BACKLOG = 1024
UNREAD_SECONDS = 30.0
SMALL_PIECE, MOST_SMALL = 256, 1_000
HEADER_BYTES = 2**16  # Default of uvicorn.
# Time limit for headers, from the start of the connection or from the first byte of the request.
HEADER_SECONDS = 30.0


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


class Connection(h11.Connection):
  """Reads requests. Rejects a body with more than MOST_SMALL pieces below SMALL_PIECE bytes.

  The server reads one piece at a time. A piece of one byte takes as long as a piece of thousands of
  bytes, so a body in many small pieces would delay all other requests.
  """

  small = 0

  def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
    event = super().next_event()
    if isinstance(event, h11.Request):
      self.small = 0
    elif isinstance(event, h11.Data):
      self.small += len(event.data) < SMALL_PIECE
      if self.small > MOST_SMALL:
        raise h11.RemoteProtocolError("the body arrives in too many small pieces.")
    return event


class HttpProtocol(H11Protocol):
  """HTTP/1.1 protocol with the limit of `Connection` and a time limit for headers.

  Without the time limit, uvicorn would wait for headers forever.
  """

  _headers_timer: asyncio.TimerHandle | None = None

  def __init__(self, *args: Any, **kwargs: Any):
    super().__init__(*args, **kwargs)
    self.conn = Connection(h11.SERVER, HEADER_BYTES)

  def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
    super().connection_made(transport)
    self._headers_timer = self.loop.call_later(HEADER_SECONDS, transport.close)

  def data_received(self, data: bytes) -> None:
    super().data_received(data)
    if self.conn.their_state is not h11.IDLE:  # The headers are complete or invalid.
      self._forget_timer()
    elif self._headers_timer is None:
      self._headers_timer = self.loop.call_later(HEADER_SECONDS, self.transport.close)

  def connection_lost(self, exc: Exception | None) -> None:
    self._forget_timer()
    super().connection_lost(exc)

  def _forget_timer(self) -> None:
    if self._headers_timer is not None:
      self._headers_timer.cancel()
      self._headers_timer = None


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
  config = uvicorn.Config(
    app,
    http=HttpProtocol,
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

  Prints one line with the address when the programs are compiled.

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
  engine.close(seconds=stop_seconds if engine.is_ready else 0)  # 0: it still compiles.
  if engine.failure is not None:
    raise RuntimeError("the engine has failed; its error is above.") from engine.failure
  print("stopped.", flush=True)


def _announce(engine: Engine, server: uvicorn.Server, name: str, address: str) -> None:
  """Prints the address when the engine is ready. Stops the server if the engine fails first."""
  if engine.wait_until_ready():
    print(f"serving {name} at {address}", flush=True)
  else:
    server.should_exit = True

"""Runs the application with uvicorn: one process, until SIGTERM or Ctrl-C."""

import os
import signal
import socket
import sys
import threading

import uvicorn

from cm3leon_jax.config import UserError
from cm3leon_jax.serving.app import Server
from cm3leon_jax.serving.engine import Engine
from cm3leon_jax.serving.limits import Limits, is_loopback

BACKLOG = 1024


def listen(host: str, port: int) -> socket.socket:
  """Opens the port. Raises UserError if it is taken, or the address is not of this machine."""
  family = socket.AF_INET6 if ":" in host else socket.AF_INET
  opened = socket.socket(family)
  opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
  try:
    opened.bind((host, port))
  except OSError as error:
    opened.close()
    raise UserError(
      f"--host={host} --port={port} cannot be opened ({error.strerror or error}): name another "
      "--port, or end the program that has it."
    ) from error
  return opened


def url(host: str, port: int) -> str:
  """Returns the address of the page."""
  return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


def serve(
  engine: Engine, name: str, limits: Limits, host: str, opened: socket.socket, stop_seconds: int
) -> None:
  """Serves until a signal; requests under way then have `stop_seconds` to end.

  Prints one line with the address when the usual programs are compiled.

  Args:
    engine: not started.
    name: of the model.
    limits: of requests.
    host: address of `opened`.
    opened: of `listen`.
    stop_seconds: see above.

  Raises:
    RuntimeError: the engine could not start.
  """
  app = Server(engine, name, limits).app(is_loopback(host))
  server = uvicorn.Server(
    uvicorn.Config(
      app,
      log_level="warning",
      access_log=False,
      server_header=False,
      lifespan="off",
      ws="none",
      backlog=BACKLOG,
      timeout_keep_alive=30,
      timeout_graceful_shutdown=stop_seconds,
    )
  )
  address = url(host, opened.getsockname()[1])
  # uvicorn stops at these signals, and then raises them again.
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: None)
  engine.start()
  announcer = threading.Thread(target=_announce, args=(engine, server, name, address), daemon=True)
  announcer.start()
  server.run(sockets=[opened])
  ended = engine.close(seconds=stop_seconds)
  if engine.failure is not None:
    raise RuntimeError("the engine has failed; its error is above.") from engine.failure
  print("stopped.", flush=True)
  if not ended:  # It compiles; while Python ends, XLA's threads would crash.
    sys.stderr.flush()
    os._exit(0)


def _announce(engine: Engine, server: uvicorn.Server, name: str, address: str) -> None:
  """Prints the address when the engine is ready; ends the server if it cannot become so."""
  if engine.wait_until_ready():
    print(f"serving {name} at {address}", flush=True)
  else:
    server.should_exit = True

import contextlib
import socket
import time

import httpx
import pytest

from cm3leon_jax.serving.web import server
from cm3leon_jax.serving.web.limits import Limits
from tests.serving.live import Live

SECONDS = 1.0
REQUEST = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
MOST = 4


@pytest.fixture
def impatient(engine, monkeypatch):
  """Starts a server that allows few connections and closes slow ones after a second."""
  monkeypatch.setattr(server, "HEADER_SECONDS", SECONDS)
  with Live(engine, Limits(), connections=MOST) as live:
    live.http.close()  # Otherwise this client would occupy a connection.
    yield live


@pytest.fixture
def connect(impatient):
  with contextlib.ExitStack() as stack:

    def opened(sent: bytes = b"") -> socket.socket:
      connection = socket.create_connection(("127.0.0.1", impatient.port), timeout=30)
      stack.enter_context(connection)
      connection.sendall(sent)
      return connection

    yield opened


def answer(connection: socket.socket) -> bytes:
  """Reads one response from an open connection; returns b"" if it was closed."""
  found = b""
  while b"\r\n\r\n{" not in found or not found.endswith(b"}"):
    received = connection.recv(65_536)
    if not received:
      break
    found += received
  return found


def seconds_until_closed(connection: socket.socket, more: bytes) -> float:
  """Sends one byte every 0.1 s until the server closes the connection; returns the duration."""
  start = time.monotonic()
  connection.settimeout(0.1)
  for byte in more * 100:
    try:
      connection.sendall(bytes([byte]))
      assert connection.recv(100) == b""
      break
    except TimeoutError:
      continue
    except OSError:
      break
  return time.monotonic() - start


def test_slow_headers_keep_others_out_for_a_limited_time(impatient, connect):
  slow = [connect(b"GET /v1/models HTTP/1.1\r\nX: ")] + [connect() for _ in range(MOST - 1)]
  time.sleep(0.2)
  assert httpx.get(f"{impatient.url}/v1/models").status_code == 503
  assert seconds_until_closed(slow[0], b"a") < 10 * SECONDS
  assert [connection.recv(100) for connection in slow[1:]] == [b""] * (MOST - 1)
  assert httpx.get(f"{impatient.url}/v1/models").status_code == 200


@pytest.mark.slow
def test_a_connection_that_waits_between_requests_stays_and_a_slow_second_one_does_not(connect):
  connection = connect(REQUEST)
  assert answer(connection).startswith(b"HTTP/1.1 200")
  time.sleep(1.5 * SECONDS)
  connection.sendall(REQUEST)
  assert answer(connection).startswith(b"HTTP/1.1 200")
  assert SECONDS / 2 < seconds_until_closed(connection, b"GET /") < 10 * SECONDS

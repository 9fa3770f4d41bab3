"""Tests that bodies that never end or arrive byte by byte do not disturb other requests."""

import contextlib
import dataclasses
import json
import select
import socket

import pytest

from cm3leon_jax.serving.web import server
from cm3leon_jax.serving.web.limits import SMALL
from tests.serving.conftest import LIMITS
from tests.serving.live import Live, error

BODY = {"prompt": "a red apple", "seed": 1, "retrieve": 0}
PATH = "/v1/images/generations"


def opened(live, headers: str, body: bytes) -> socket.socket:
  client = socket.create_connection(("127.0.0.1", live.port), timeout=60)
  kind = "Content-Type: application/json"
  client.sendall(f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\n{kind}\r\n{headers}\r\n\r\n".encode())
  # The server may respond and close the connection early.
  with contextlib.suppress(ConnectionError):
    client.sendall(body)
  return client


def answered(client: socket.socket) -> bytes:
  """Reads the response until the server closes the connection."""
  received = b""
  with contextlib.suppress(ConnectionError):
    while piece := client.recv(2**16):
      received += piece
  return received


def test_bodies_that_wait_for_their_end_are_bounded_together(engine, run):
  limits = dataclasses.replace(LIMITS, all_bytes=100_000)
  size = 130_000
  large = json.dumps({**BODY, "user": "a" * size}).encode()
  # Invalid, but only rejected after the whole body is read.
  wrong = json.dumps({**BODY, "n": 0, "user": "a" * size}).encode()
  with Live(engine, limits, secret=str(run)) as live, contextlib.ExitStack() as stack:

    def hold():
      client = opened(live, f"Content-Length: {len(large)}", large[:-1])
      return stack.enter_context(contextlib.closing(client))

    def ask_until(status, body=large):
      """Repeats a request until it gets `status`: the server notices other clients late."""
      headers = {"Content-Type": "application/json"}
      for _ in range(100):
        answer = live.http.post(PATH, content=body, headers=headers)
        if answer.status_code == status:
          break
      return answer

    ask_until(200)
    assert size - SMALL < limits.all_bytes < 2 * (size - SMALL)
    while True:  # Of two simultaneous large bodies, the server may reject either.
      first = hold()
      answer = ask_until(503, wrong)
      if not select.select([first], [], [], 0.5)[0]:
        break
    assert error(answer) == (
      503,
      "the server holds 100,000 bytes of other requests: try again in 30 s.",
    )
    assert answer.headers["retry-after"] == "30"
    assert live.generate(**BODY).status_code == 200  # A small body, which has no image.
    assert live.generate(**BODY, user="a" * (SMALL - 500)).status_code == 200
    first.sendall(large[-1:])
    assert first.recv(64).startswith(b"HTTP/1.1 200")
    assert ask_until(200).status_code == 200
    hold().close()
    assert ask_until(200).status_code == 200


@pytest.mark.parametrize("header", ["Upgrade: x\r\nConnection: upgrade", "Accept: */*"])
def test_small_chunks_count_after_any_request(live, header):
  chunks = b"1\r\n \r\n" * 50_000
  second = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
  client = socket.create_connection(("127.0.0.1", live.port), timeout=60)
  with contextlib.closing(client):
    client.sendall(f"GET /healthz HTTP/1.1\r\nHost: localhost\r\n{header}\r\n\r\n".encode())
    assert client.recv(2**16).startswith(b"HTTP/1.1 200")
    with contextlib.suppress(ConnectionError):  # The server may close the connection early.
      client.sendall(second + chunks)
    assert b" 400 " in answered(client)
  live.wait_for("requests_active", 0)


@pytest.mark.parametrize(("pieces", "status"), [(server.MOST_SMALL - 10, b"200"), (50_000, b"400")])
def test_a_body_of_many_small_chunks_is_refused(live, pieces, status):
  text = json.dumps(BODY)
  text += " " * (pieces - len(text))
  chunks = b"".join(b"1\r\n%c\r\n" % c for c in text.encode()) + b"0\r\n\r\n"
  headers = "Transfer-Encoding: chunked\r\nConnection: close"
  with contextlib.closing(opened(live, headers, chunks)) as client:
    assert answered(client).startswith(b"HTTP/1.1 " + status)
  assert live.generate(**BODY).status_code == 200
  live.wait_for("requests_active", 0)


def test_small_chunks_count_for_each_request(live):
  text = json.dumps(BODY).encode()
  text += b" " * (server.MOST_SMALL - 100 - len(text))
  chunks = b"".join(b"1\r\n%c\r\n" % c for c in text) + b"0\r\n\r\n"
  with contextlib.closing(opened(live, "Transfer-Encoding: chunked", chunks)) as client:
    for _ in range(2):
      assert client.recv(64).startswith(b"HTTP/1.1 200")
      while client.recv(2**16)[-1:] != b"}":
        pass
      client.sendall(
        f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        "Transfer-Encoding: chunked\r\n\r\n".encode()
        + chunks
      )

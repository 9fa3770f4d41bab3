import asyncio
import contextlib
import dataclasses
import threading

import pytest

from cm3leon_jax.serving.web import decoders
from tests.serving.conftest import LIMITS
from tests.serving.live import Live, about, error, image, png

IMAGE = image(0)
BODY = {"prompt": "a red apple", "seed": 1, "retrieve": 0}
EDIT = {"prompt": "make it blue", "seed": "1"}


class Decoder:
  """Fake decoder that waits until `may_go` is set; counts images, and parallel calls."""

  def __init__(self):
    self.may_go, self.ask = threading.Event(), decoders.ask
    self.calls = self.running = self.most = 0

  async def __call__(self, *arguments):
    self.calls, self.running = self.calls + 1, self.running + 1
    self.most = max(self.most, self.running)
    try:
      while not self.may_go.is_set():
        await asyncio.sleep(0.01)
      return await self.ask(*arguments)
    finally:
      self.running -= 1


@pytest.fixture
def decoder(monkeypatch):
  decoder = Decoder()
  monkeypatch.setattr(decoders, "ask", decoder)
  yield decoder
  decoder.may_go.set()


@contextlib.contextmanager
def uploaded(live, count):
  """Yields the responses to `count` clients that upload images."""
  answers = []

  def ask(i):
    if i % 2:
      answers.append(live.chat(about(IMAGE), max_tokens=2, seed=i))
    else:
      answers.append(live.edit(png(IMAGE), **EDIT))

  clients = [threading.Thread(target=ask, args=(i,)) for i in range(count)]
  for client in clients:
    client.start()
  try:
    yield answers
  finally:
    for client in clients:
      client.join(60)


def test_a_request_without_an_image_does_not_wait_for_those_with_one(live, decoder):
  late = threading.Timer(20, decoder.may_go.set)  # Otherwise a failed test would wait forever.
  late.start()
  with uploaded(live, 40) as answers:
    live.wait_for("requests_waiting", 40)
    assert live.generate(**BODY).status_code == 200
    assert not decoder.may_go.is_set()
    assert not answers
    decoder.may_go.set()
  late.cancel()
  assert [answer.status_code for answer in answers] == [200] * 40
  assert decoder.calls == 40
  assert decoder.most == decoders.COUNT


def test_a_full_queue_refuses_images_before_they_are_decoded(idle, run, decoder):
  with Live(idle, dataclasses.replace(LIMITS, seconds=2), secret=str(run)) as live:
    assert live.http.get("/readyz").status_code == 503
    assert live.http.get("/healthz").status_code == 200
    with uploaded(live, 2) as answers:
      live.wait_for("requests_waiting", 2)
      for answer in (live.edit(png(IMAGE), **EDIT), live.chat(about(IMAGE)), live.generate(**BODY)):
        assert error(answer)[0] == 429
        assert answer.json()["error"]["type"] == "rate_limit_error"
        assert int(answer.headers["retry-after"]) > 0
      assert decoder.calls == 2
    # Both requests timed out while their images were decoded.
    assert [answer.status_code for answer in answers] == [504] * 2
    live.wait_for("requests_waiting", 0)


def test_a_client_that_leaves_is_not_decoded(live, decoder):
  with uploaded(live, decoders.COUNT):
    live.wait_for("requests_waiting", decoders.COUNT)
    with pytest.raises(Exception, match="timed out"):
      live.http.post(
        "/v1/images/edits", files={"image": ("a.png", png(IMAGE))}, data=EDIT, timeout=0.3
      )
    live.wait_for("requests_waiting", decoders.COUNT)
    decoder.may_go.set()
  live.wait_for("requests_active", 0)
  assert decoder.calls == decoders.COUNT

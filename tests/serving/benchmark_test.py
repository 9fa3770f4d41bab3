"""Tests that the load test sends the requests that it reports, and counts errors."""

import asyncio
import os
import re
import types

import pytest

from benchmarks.speed import serving
from tests.serving.live import image


def answers(live) -> dict[tuple[str, str], int]:
  """Returns (endpoint, status) -> number of responses."""
  pattern = r'requests_total\{endpoint="(.*)",status="(.*)"\} (\d+)'
  found = re.findall(pattern, live.http.get("/metrics").text)
  return {(endpoint, status): int(count) for endpoint, status, count in found}


@pytest.mark.slow
def test_the_server_and_the_python_call_make_the_same_images_in_turns(live, model):
  before, asked = live.gauge("samples_total"), []

  def generate(prompts):
    asked.append(prompts)
    return model.generate(prompts)

  recorded = types.SimpleNamespace(generate=generate)
  found = serving.in_turns(recorded, live.url, os.getpid(), each=5, turns=2, clients=3)
  assert found["errors"] == 0
  assert live.gauge("samples_total") == before + 10
  first, second = ([serving.prompt(i) for i in numbers] for numbers in (range(5), range(5, 10)))
  assert asked == [serving.prompt(0), first, first, second]
  assert len(found["resident_mib"]) == 3
  assert min(found["resident_mib"]) > 100
  for clock in ("wall", "processor"):
    median, least, most = found[clock]["ratio"]
    assert 0 < least <= median <= most
    offline = found[clock]["offline_images_per_second"]
    served = found[clock]["server_images_per_second"]
    assert least <= served[2] / offline[1]
    assert most >= served[1] / offline[2]


def test_refused_requests_are_errors(live):
  nowhere = f"{live.url}/nowhere/"
  _, errors = asyncio.run(
    serving.full(nowhere, os.getpid(), range(3), serving.given_image(image(0)), 2)
  )
  assert len(errors) == 3
  assert "404" in errors[0]
  found = asyncio.run(serving.mixed(nowhere, 1e3, 3, serving.given_image(image(0))))
  assert found["errors"] == 3 + len(serving.KINDS)


def test_mixed_requests_are_of_all_kinds(live):
  before = answers(live)
  found = asyncio.run(serving.mixed(live.url, 1e3, 6, serving.given_image(image(0))))
  assert found["errors"] == 0, found["first_errors"]
  assert 0 < found["p50_seconds"] <= found["p95_seconds"]
  # Each endpoint has two kinds of requests; each kind is sent twice, to compile and as load.
  for endpoint in ("/v1/images/generations", "/v1/images/edits", "/v1/chat/completions"):
    assert answers(live)[endpoint, "200"] == before.get((endpoint, "200"), 0) + 4


def test_clients_that_leave_hold_nothing(live):
  found = asyncio.run(serving.killed(live.url, 3))
  assert found == {"streams_begun": 3, "requests_active": 0, "samples_running": 0}

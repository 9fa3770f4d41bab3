import logging
import time

import pytest

from cm3leon_jax.serving.web import request_log
from cm3leon_jax.serving.web.request_log import Made, line
from tests.serving.live import about, events, image, png

SECRET = "a purple submarine"


@pytest.mark.parametrize(
  ("arguments", "expected"),
  [
    (
      ("POST", "/v1/images/generations", 200, 1.5, Made(2, 512), "7f3a-1"),
      "POST /v1/images/generations status=200 seconds=1.500 images=2 tokens=512 id=7f3a-1",
    ),
    (("GET", "/v1/models", 401, 0.0004, Made()), "GET /v1/models status=401 seconds=0.000"),
    (("GET", "/a\nb c", 404, 0.001, Made(), "x\ny"), "GET /a%0Ab%20c status=404 seconds=0.001"),
    (("A\r" * 40, "/é", 499, 9.0, Made(0, 3), ""), f"{'A%0D' * 4} /%C3%A9 status=499 "
     "seconds=9.000 tokens=3"),
  ],
)  # fmt: skip
def test_a_line_has_what_a_request_cost(arguments, expected):
  assert line(*arguments) == expected


def test_a_long_path_and_a_long_id_do_not_fill_the_log():
  found = line("GET", "/" + "a" * 5000, 404, 0.0, Made(), "i" * 5000)
  assert len(found) < 200


@pytest.fixture
def lines(caplog):
  """Returns a function that waits for `count` log lines and returns all lines from level INFO."""
  caplog.set_level(logging.INFO, request_log.NAME)

  def found(count: int) -> list[str]:
    # A request is logged after its response, so the client may be faster than the log.
    ends = time.monotonic() + 30
    while True:
      own = [r.getMessage() for r in caplog.records if r.name == request_log.NAME]
      if len(own) >= count or time.monotonic() > ends:
        break
      time.sleep(0.01)
    assert len(own) == count, own
    assert SECRET not in caplog.text
    return own

  return found


def test_each_request_is_a_line_with_its_images_and_tokens(live, lines):
  answer = live.http.post(
    "/v1/images/generations",
    json={"prompt": SECRET, "n": 2, "seed": 1, "retrieve": 0},
    headers={"X-Request-Id": "load-balancer/17"},
  )
  tokens = answer.json()["usage"]["output_tokens"]
  live.edit(png(image(0)), prompt=SECRET, seed="3")
  text = live.chat(about(image(0), SECRET), seed=4, max_tokens=8).json()
  live.http.get(f"/v1/models/{SECRET.split()[1]}", params={"prompt": SECRET})
  live.wait_for("requests_active", 0)
  first, edit, chat, model = lines(4)
  assert first.startswith("POST /v1/images/generations status=200 seconds=")
  assert first.endswith(f" images=2 tokens={tokens} id=load-balancer/17")
  assert edit.startswith("POST /v1/images/edits status=200 ")
  assert " images=1 tokens=" in edit
  assert chat.startswith("POST /v1/chat/completions status=200 ")
  assert chat.endswith(f" tokens={text['usage']['completion_tokens']}")
  assert model.startswith("GET /v1/models/purple status=404 seconds=0.")


def test_refused_and_streamed_requests_are_lines_too(live, lines):
  live.generate(prompt="")
  found = events(live.generate(prompt=SECRET, seed=1, retrieve=0, stream=True))
  live.wait_for("requests_active", 0)
  refused, streamed = lines(2)
  assert refused.startswith("POST /v1/images/generations status=400 seconds=0.")
  assert "tokens" not in refused
  assert streamed.endswith(f" images=1 tokens={found[-1]['usage']['output_tokens']}")


def test_probes_are_no_lines_unless_debugging(live, lines, caplog):
  for path in sorted(request_log.PROBES):
    assert live.http.get(path).status_code == 200
  live.http.get("/v1/models")
  [only] = lines(1)
  assert only.startswith("GET /v1/models status=200")
  caplog.set_level(logging.DEBUG, request_log.NAME)
  live.http.get("/health")
  live.http.get("/v1/models")
  assert [found.split()[1] for found in lines(3)[1:]] == ["/health", "/v1/models"]

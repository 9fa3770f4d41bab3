import types

from cm3leon_jax.serving.web.metrics import CONTENT_TYPE, Metrics

ENGINE = types.SimpleNamespace(
  is_ready=True, is_warm=False, active=2, waiting=1, running=5, slots=8, samples=3, tokens=48
)
GENERATIONS = "/v1/images/generations"


def values(text):
  """Returns name with labels -> value, for each metric in the text."""
  lines = [line for line in text.splitlines() if not line.startswith("#")]
  return {name: float(x) for name, x in (line.rsplit(" ", 1) for line in lines)}


def test_the_text_by_hand():
  metrics = Metrics(ENGINE)
  for seconds in (0.25, 3.0, 400.0):
    metrics.count(GENERATIONS, 200, seconds)
  metrics.count("other", 404, 0.01)
  text = metrics.text()
  assert text.startswith(
    "# HELP cm3leon_serve_ready 1 when the first programs are compiled.\n"
    "# TYPE cm3leon_serve_ready gauge\ncm3leon_serve_ready 1.0\n"
  )
  for kind in ("samples_total counter", "requests_total counter", "request_seconds histogram"):
    assert f"\n# TYPE cm3leon_serve_{kind}\n" in text
  found = values(text)
  bounds = [0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300]
  name, other = f'endpoint="{GENERATIONS}"', 'endpoint="other"'
  seconds = "cm3leon_serve_request_seconds"
  buckets = {
    f'{seconds}_bucket{{{endpoint},le="{bound}"}}': float(count)
    for endpoint, counts in (
      (name, [0, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 3]),
      (other, [1] * 12),
    )
    for bound, count in zip([*map(float, bounds), "+Inf"], counts)
  }
  assert found == {
    "cm3leon_serve_ready": 1,
    "cm3leon_serve_warm": 0,
    "cm3leon_serve_requests_active": 2,
    "cm3leon_serve_requests_waiting": 1,
    "cm3leon_serve_samples_running": 5,
    "cm3leon_serve_slots": 8,
    "cm3leon_serve_samples_total": 3,
    "cm3leon_serve_tokens_total": 48,
    f'cm3leon_serve_requests_total{{{name},status="200"}}': 3,
    f'cm3leon_serve_requests_total{{{other},status="404"}}': 1,
    **buckets,
    f"{seconds}_sum{{{name}}}": 403.25,
    f"{seconds}_count{{{name}}}": 3,
    f"{seconds}_sum{{{other}}}": 0.01,
    f"{seconds}_count{{{other}}}": 1,
  }
  assert CONTENT_TYPE == "text/plain; version=0.0.4; charset=utf-8"


def test_a_full_queue_is_left_for_the_time_that_recent_answers_took():
  metrics = Metrics(ENGINE)
  assert metrics.retry_seconds() == 2
  for status, seconds in ((200, 20.0), (429, 0.1), (200, 30.5), (504, 120.0)):
    metrics.count(GENERATIONS, status, seconds)
  metrics.count("/healthz", 200, 0.1)
  assert metrics.retry_seconds() == 26

"""Reports the metrics of the server in the text format of Prometheus (version 0.0.4)."""

import collections
from collections.abc import Iterator
import math

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from cm3leon_jax.serving.engine import Engine

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)  # Bounds of the histogram's buckets.

UNKNOWN_SECONDS = 2  # Result of `retry_seconds` before the first answer.


class Metrics:
  """Counts requests, and reads the engine's counters when the metrics are requested."""

  def __init__(self, engine: Engine):
    self._engine = engine
    self._recent: collections.deque[float] = collections.deque(maxlen=32)
    self._requests = Counter(
      "cm3leon_serve_requests",
      "Requests by endpoint and HTTP status.",
      ["endpoint", "status"],
      registry=None,
    )
    self._seconds = Histogram(
      "cm3leon_serve_request_seconds",
      "Seconds from start to end of a request.",
      ["endpoint"],
      registry=None,
      buckets=SECONDS,
    )

  def count(self, endpoint: str, status: int, seconds: float) -> None:
    """Counts a finished request. Status 499: the client disconnected before it was answered."""
    if status == 200 and endpoint.startswith("/v1/") and endpoint != "/v1/models":
      self._recent.append(seconds)
    self._requests.labels(endpoint, status).inc()
    self._seconds.labels(endpoint).observe(seconds)

  def retry_seconds(self) -> int:
    """Estimates in how many seconds a full queue has been answered.

    This is the mean time, waiting included, of the last requests that were answered.
    """
    return math.ceil(sum(self._recent) / len(self._recent)) if self._recent else UNKNOWN_SECONDS

  def text(self) -> str:
    """Returns all metrics as text."""
    return generate_latest(self).decode()

  def collect(self) -> Iterator[Metric]:
    """Yields all metrics for `generate_latest`."""
    engine, gauge, counter = self._engine, GaugeMetricFamily, CounterMetricFamily
    for name, kind, value, meaning in (
      ("ready", gauge, engine.is_ready, "1 when the first programs are compiled."),
      ("warm", gauge, engine.is_warm, "1 when all programs of usual requests are compiled."),
      ("requests_active", gauge, engine.active, "Requests that are not answered yet."),
      ("requests_waiting", gauge, engine.waiting, "Requests with a sample that has no slot yet."),
      ("samples_running", gauge, engine.running, "Samples that have a slot."),
      ("slots", gauge, engine.slots, "Number of slots of each bucket."),
      ("samples_total", counter, engine.samples, "Samples that were completed."),
      ("tokens_total", counter, engine.tokens, "Tokens of these samples."),
    ):
      yield kind(f"cm3leon_serve_{name}", meaning, value)
    for metric in (*self._requests.collect(), *self._seconds.collect()):
      metric.samples = [s for s in metric.samples if not s.name.endswith("_created")]
      yield metric

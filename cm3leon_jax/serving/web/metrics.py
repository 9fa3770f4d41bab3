"""Reports the numbers of the server in the text format of Prometheus (version 0.0.4)."""

from collections import Counter, defaultdict
import resource
import sys
import threading

from cm3leon_jax.serving.engine import Engine

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)  # Upper bounds of the histogram.


class Metrics:
  """Counts requests, and reads the numbers of the engine on demand."""

  def __init__(self, engine: Engine):
    self._engine, self._lock = engine, threading.Lock()
    self._answers: Counter[tuple[str, int]] = Counter()
    self._buckets: dict[str, list[int]] = {}
    self._seconds: defaultdict[str, float] = defaultdict(float)

  def count(self, endpoint: str, status: int, seconds: float) -> None:
    """Counts a request that has ended. Status 499 means that the client disconnected before."""
    with self._lock:
      self._answers[endpoint, status] += 1
      self._seconds[endpoint] += seconds
      buckets = self._buckets.setdefault(endpoint, [0] * (len(SECONDS) + 1))
      for i, bound in enumerate((*SECONDS, float("inf"))):
        buckets[i] += seconds <= bound

  def text(self) -> str:
    """Returns all numbers as text."""
    engine, lines = self._engine, []
    for name, kind, value, meaning in (
      ("ready", "gauge", int(engine.is_ready), "1 when the programs are compiled."),
      ("requests_active", "gauge", engine.active, "Requests that are not answered yet."),
      ("requests_waiting", "gauge", engine.waiting, "Requests with a sample that has no slot yet."),
      ("samples_running", "gauge", engine.running, "Samples that have a slot."),
      ("slots", "gauge", engine.slots, "Number of slots of each bucket."),
      ("samples_total", "counter", engine.samples, "Samples that were completed."),
      ("tokens_total", "counter", engine.tokens, "Tokens of these samples."),
      ("peak_memory_bytes", "gauge", _peak_bytes(), "Largest resident memory of the process."),
    ):
      lines += [*_head(name, kind, meaning), f"cm3leon_serve_{name} {value}"]
    with self._lock:
      lines += _head("requests_total", "counter", "Requests by endpoint and HTTP status.")
      for (endpoint, status), count in sorted(self._answers.items()):
        labels = f'{{endpoint="{endpoint}",status="{status}"}}'
        lines.append(f"cm3leon_serve_requests_total{labels} {count}")
      lines += _head("request_seconds", "histogram", "Seconds from start to end of a request.")
      for endpoint, buckets in sorted(self._buckets.items()):
        for bound, count in zip((*SECONDS, "+Inf"), buckets):
          labels = f'{{endpoint="{endpoint}",le="{bound}"}}'
          lines.append(f"cm3leon_serve_request_seconds_bucket{labels} {count}")
        of = f'{{endpoint="{endpoint}"}}'
        lines.append(f"cm3leon_serve_request_seconds_sum{of} {self._seconds[endpoint]!r}")
        lines.append(f"cm3leon_serve_request_seconds_count{of} {buckets[-1]}")
    return "\n".join(lines) + "\n"


def _head(name: str, kind: str, meaning: str) -> list[str]:
  return [f"# HELP cm3leon_serve_{name} {meaning}", f"# TYPE cm3leon_serve_{name} {kind}"]


def _peak_bytes() -> int:
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak if sys.platform == "darwin" else 1024 * peak

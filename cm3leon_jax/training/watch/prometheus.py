"""Serves the metrics of a run to Prometheus over HTTP."""

from collections.abc import Callable, Iterator
import http.server
import threading
import time

from PIL import Image
from prometheus_client import CollectorRegistry, MetricsHandler
from prometheus_client.core import GaugeMetricFamily

from cm3leon_jax.training.watch.goodput import Stopwatch, goodput

# Name of a metric, key of its value in a metrics line, and help text of the metric.
GAUGES = (
  ("step", "step", "Last logged step."),
  ("steps", "steps", "Steps of the whole run."),
  ("loss", "loss", "Loss of that step, nats per target."),
  ("heldout_loss", "heldout_loss", "Last held-out loss, nats per target."),
  ("tokens_per_second", "tokens_per_second", "Targets per second, all devices together."),
  ("goodput_ratio", "goodput", "Share of steps in the wall time of all starts."),
)
IDLE = "cm3leon_seconds_since_last_step"
READ_SECONDS = 10  # Connections that send nothing for this long are closed.


class Prometheus:
  """Serves GET /metrics on all network interfaces, to anyone who can reach the port."""

  def __init__(
    self, port: int, steps: int, watch: Stopwatch, clock: Callable[[], float] = time.monotonic
  ):
    """Opens the port. Port 0 selects a free port and stores its number in `self.port`.

    Raises:
      OSError: another program uses the port.
    """
    self._watch, self._clock = watch, clock
    self._values: dict[str, float | int] = {"steps": steps}
    self._stepped = clock()
    registry = CollectorRegistry()
    registry.register(self)
    self._server = http.server.ThreadingHTTPServer(("", port), _Handler.factory(registry))
    self.port = self._server.server_address[1]
    self._thread = threading.Thread(
      target=self._server.serve_forever, name="prometheus", daemon=True
    )
    self._thread.start()

  def collect(self) -> Iterator[GaugeMetricFamily]:
    """Yields the metrics that are known so far."""
    values = self._values
    for name, source, meaning in GAUGES:
      if source in values:
        yield GaugeMetricFamily(f"cm3leon_{name}", meaning, values[source])
    idle = self._clock() - self._stepped
    yield GaugeMetricFamily(IDLE, "Seconds since a step was logged, or since the start.", idle)

  def scalars(self, step: int, values: dict) -> None:
    """Updates the metrics with the values of a metrics line."""
    found = {name: values[name] for _, name, _ in GAUGES if name in values}
    share = goodput(self._watch.seconds())
    # One assignment, because other threads read the dict.
    self._values = {**self._values, **found, "step": step, "goodput": share}
    if "loss" in values:
      self._stepped = self._clock()

  def samples(self, step: int, sheet: Image.Image) -> None:
    """Does nothing: Prometheus stores only numbers."""

  def flush(self) -> None:
    """Does nothing, because no values are buffered."""

  def close(self) -> None:
    """Closes the port."""
    self._server.shutdown()
    self._server.server_close()
    self._thread.join()


class _Handler(MetricsHandler):
  timeout = READ_SECONDS

  def do_GET(self) -> None:
    if self.path.partition("?")[0] != "/metrics":
      self.send_error(404)
    else:
      super().do_GET()

"""Serves the metrics of a run to Prometheus over HTTP."""

from collections.abc import Callable
import time

from PIL import Image
from prometheus_client import CollectorRegistry, Gauge, start_http_server

from cm3leon_jax.training.watch.goodput import Stopwatch, goodput

# Key of a value in a metrics line -> help text of the metric.
GAUGES = {
  "step": "Last logged step.",
  "steps": "Steps of the whole run.",
  "loss": "Loss of that step, nats per target.",
  "heldout_loss": "Last held-out loss, nats per target.",
  "tokens_per_second": "Targets per second, all devices together.",
  "goodput_ratio": "Share of steps in the wall time of all starts.",
}
IDLE = "cm3leon_seconds_since_last_step"


class Prometheus:
  """Serves the metrics on all network interfaces, to anyone who can reach the port."""

  def __init__(
    self, port: int, steps: int, watch: Stopwatch, clock: Callable[[], float] = time.monotonic
  ):
    """Opens the port. Port 0 selects a free port and stores its number in `self.port`.

    Raises:
      OSError: another program uses the port.
    """
    self._watch, self._clock, self._stepped = watch, clock, clock()
    self._registry = CollectorRegistry()
    self._gauges: dict[str, Gauge] = {}
    idle = Gauge(
      IDLE, "Seconds since a step was logged, or since the start.", registry=self._registry
    )
    idle.set_function(lambda: self._clock() - self._stepped)
    self._show({"steps": steps})
    self._server, self._thread = start_http_server(port, registry=self._registry)
    self.port = self._server.server_port

  def scalars(self, step: int, values: dict) -> None:
    """Updates the metrics with the values of a metrics line."""
    self._show({**values, "step": step, "goodput_ratio": goodput(self._watch.seconds())})
    if "loss" in values:
      self._stepped = self._clock()

  def _show(self, values: dict) -> None:
    for name in GAUGES.keys() & values.keys():
      if name not in self._gauges:
        self._gauges[name] = Gauge(f"cm3leon_{name}", GAUGES[name], registry=self._registry)
      self._gauges[name].set(values[name])

  def samples(self, step: int, sheet: Image.Image) -> None:
    """Does nothing: Prometheus stores only numbers."""

  def flush(self) -> None:
    """Does nothing, because no values are buffered."""

  def close(self) -> None:
    """Closes the port."""
    self._server.shutdown()
    self._server.server_close()
    self._thread.join()

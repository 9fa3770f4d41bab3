"""Prometheus: the state of a run as text over HTTP, for clusters that scrape."""

from collections.abc import Callable
import http.server
import threading
import time

from PIL import Image

from cm3leon_jax.training.watch.goodput import Stopwatch, goodput

# Name, its source among the values of a metrics line, and its meaning.
GAUGES = (
  ("step", "step", "Last logged step."),
  ("steps", "steps", "Steps of the whole run."),
  ("loss", "loss", "Loss of that step, nats per target."),
  ("heldout_loss", "heldout_loss", "Last held-out loss, nats per target."),
  ("tokens_per_second", "tokens_per_second", "Targets per second, all devices together."),
  ("replay_faults", "replay_faults", "Silent errors that this start found (train.replay_every)."),
  ("goodput_ratio", "goodput", "Share of steps in the wall time of all starts."),
)
IDLE = "cm3leon_seconds_since_last_step"
READ_SECONDS = 10  # A client that sends nothing is let go.


class Prometheus:
  """Serves GET /metrics, in the text format of Prometheus (version 0.0.4), on all addresses.

  Everybody who reaches the port can read these numbers; nothing else is served.
  """

  def __init__(
    self, port: int, steps: int, watch: Stopwatch, clock: Callable[[], float] = time.monotonic
  ):
    """Opens the port. Port 0 takes a free one, see `port`.

    Raises:
      OSError: the port is taken.
    """
    self._watch, self._clock = watch, clock
    self._values: dict[str, float | int] = {"steps": steps}
    self._stepped = clock()
    self._server = http.server.ThreadingHTTPServer(("", port), _handler(self.text))
    self.port = self._server.server_address[1]
    self._thread = threading.Thread(
      target=self._server.serve_forever, name="prometheus", daemon=True
    )
    self._thread.start()

  def text(self) -> str:
    """Returns the metrics that are known so far."""
    values = self._values
    lines = []
    for name, source, meaning in GAUGES:
      if source in values:
        lines += _gauge(f"cm3leon_{name}", values[source], meaning)
    lines += _gauge(IDLE, self._clock() - self._stepped, "Since a step was logged, or the start.")
    return "\n".join(lines) + "\n"

  def scalars(self, step: int, values: dict) -> None:
    """Takes the values of a metrics line."""
    found = {name: values[name] for _, name, _ in GAUGES if name in values}
    share = goodput(self._watch.seconds())
    # One assignment: other threads read it.
    self._values = {**self._values, **found, "step": step, "goodput": share}
    if "loss" in values:
      self._stepped = self._clock()

  def samples(self, step: int, sheet: Image.Image) -> None:
    """Does nothing: Prometheus has numbers only."""

  def histograms(self, step: int, histograms: dict) -> None:
    """Does nothing, as `samples`."""

  def flush(self) -> None:
    """Does nothing: nothing waits to be written."""

  def close(self) -> None:
    """Closes the port."""
    self._server.shutdown()
    self._server.server_close()
    self._thread.join()


def _gauge(name: str, value: float | int, meaning: str) -> list[str]:
  return [f"# HELP {name} {meaning}", f"# TYPE {name} gauge", f"{name} {float(value)!r}"]


def _handler(text: Callable[[], str]) -> type[http.server.BaseHTTPRequestHandler]:
  class Handler(http.server.BaseHTTPRequestHandler):
    timeout = READ_SECONDS

    def do_GET(self) -> None:
      if self.path.partition("?")[0] != "/metrics":
        self.send_error(404)
        return
      body = text().encode()
      self.send_response(200)
      self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
      self.send_header("Content-Length", str(len(body)))
      self.end_headers()
      self.wfile.write(body)

    def log_message(self, *_: object) -> None:
      """Prints nothing: standard error is the log of the run."""

  return Handler

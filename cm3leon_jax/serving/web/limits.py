"""Checks host, origin, token and size of a request before its body is read."""

from collections.abc import Iterable, Mapping
import dataclasses
import hmac
import ipaddress
import re
import time

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cm3leon_jax.serving.errors import ApiError
from cm3leon_jax.serving.web.metrics import Metrics

# The page loads scripts, styles and images only from this server, and cannot be framed.
HEADERS = {
  "Content-Security-Policy": (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
  ),
  "Cross-Origin-Opener-Policy": "same-origin",
  "Cross-Origin-Resource-Policy": "same-origin",
  "Referrer-Policy": "no-referrer",
  "X-Content-Type-Options": "nosniff",
  "X-Frame-Options": "DENY",
}
CLIENT_LEFT = 499  # Status for metrics; it is never sent.
SMALL = 2**16  # Bytes at the start of each body that do not count for `Limits.all_bytes`.


@dataclasses.dataclass(frozen=True)
class Limits:
  """Limits of requests.

  Attributes:
    most_samples: largest value of `n`.
    all_bytes: largest total size of the bodies of all unanswered requests. The first SMALL bytes of
      each body do not count, so small requests are never rejected because of other requests.
    seconds: time limit from a request to its answer.
    body_seconds: time limit for the client to send its body.
    token: bearer token that requests must have; empty means that no token is needed.
  """

  most_samples: int = 8
  most_bytes: int = 16 * 2**20
  all_bytes: int = 256 * 2**20
  most_pixels: int = 16_000_000
  seconds: float = 120.0
  body_seconds: float = 30.0
  token: str = ""


def is_loopback(host: str) -> bool:
  """Returns whether an address can be reached only from this machine."""
  try:
    return ipaddress.ip_address(host).is_loopback
  except ValueError:
    return host == "localhost"


def _name_of(host: str) -> str:
  """Returns the host name in a Host header, without the port; "" if the header is invalid."""
  result = re.fullmatch(r"(?:\[([0-9a-fA-F:.]+)\]|([\w.-]+))(?::(\d{1,5}))?", host, re.ASCII)
  if result is None or int(result[3] or 0) > 65_535:
    return ""
  return result[1] or result[2].lower()


class Guard:
  """Checks the headers of requests, limits their bodies, and counts them."""

  def __init__(
    self, app: ASGIApp, limits: Limits, metrics: Metrics, endpoints: Iterable[str], local: bool
  ):
    """Wraps an application.

    Args:
      endpoints: paths that are counted by name; other paths are counted together.
      local: whether the server is bound to a loopback address. If so, the Host header must also
        name a loopback address, so that a malicious page cannot read answers by DNS rebinding.
    """
    self._app, self._limits, self._metrics = app, limits, metrics
    self._endpoints, self._local = frozenset(endpoints), local
    self._held = 0  # Number of bytes that count for `Limits.all_bytes`.

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] != "http":  # There are no WebSocket endpoints.
      return await self._app(scope, receive, send)
    began, status, received, held = time.monotonic(), CLIENT_LEFT, 0, 0

    async def limited() -> Message:
      nonlocal received, held
      message = await receive()
      received += len(message.get("body", b""))
      if received > self._limits.most_bytes:
        raise self._too_large()
      counted = max(received - SMALL, 0)
      self._held, held = self._held + counted - held, counted
      if held and self._held > self._limits.all_bytes:
        raise self._too_many()
      return message

    async def answered(message: Message) -> None:
      nonlocal status
      if message["type"] == "http.response.start":
        status = message["status"]
        own = {name.lower() for name, _ in message.get("headers", ())}
        more = [(k.lower().encode(), v.encode()) for k, v in HEADERS.items()]
        kept = [(name, value) for name, value in more if name not in own]
        message = {**message, "headers": [*message.get("headers", ()), *kept]}
      await send(message)

    headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
    try:
      try:
        self._check(scope["path"], headers)
      except ApiError as error:
        response = JSONResponse(error.body(), error.status, error.headers)
        return await response(scope, receive, answered)
      await self._app(scope, limited, answered)
    finally:
      self._held -= held
      path, seconds = scope["path"], time.monotonic() - began
      self._metrics.count(path if path in self._endpoints else "other", status, seconds)

  def _check(self, path: str, headers: Mapping[str, str]) -> None:
    """Raises ApiError if a header of a request is invalid."""
    host = headers.get("host", "")
    if self._local and not is_loopback(_name_of(host)):
      raise ApiError(403, "this server answers only to localhost and 127.0.0.1.", code="wrong_host")
    if (origin := headers.get("origin")) is not None and origin not in (
      f"http://{host}",
      f"https://{host}",
    ):
      raise ApiError(403, "pages of other sites may not use this server.", code="wrong_origin")
    if self._limits.token and (path.startswith("/v1/") or path == "/metrics"):
      kind, _, given = headers.get("authorization", "").partition(" ")
      right = hmac.compare_digest(given.strip().encode(), self._limits.token.encode())
      if kind.lower() != "bearer" or not right:
        raise ApiError(
          401,
          "the token is missing or wrong: send the header Authorization: Bearer TOKEN.",
          code="invalid_api_key",
          headers={"WWW-Authenticate": "Bearer"},
        )
    length = headers.get("content-length", "0")
    if length.isdecimal() and (len(length) > 18 or int(length) > self._limits.most_bytes):
      raise self._too_large()

  def _too_large(self) -> ApiError:
    return ApiError(
      413,
      f"the body is larger than {self._limits.most_bytes:,} bytes: send a smaller image.",
      code="body_too_large",
    )

  def _too_many(self) -> ApiError:
    seconds = f"{self._limits.body_seconds:.0f}"
    return ApiError(
      503,
      f"the server holds {self._limits.all_bytes:,} bytes of other requests: try again in "
      f"{seconds} s.",
      code="too_many_bodies",
      headers={"Retry-After": seconds},
    )

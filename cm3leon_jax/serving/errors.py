"""Errors of a request in the shape of the OpenAI API."""

from collections.abc import Mapping

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
  """A request that is not answered, in one sentence.

  Attributes:
    status: of HTTP.
    message: what is wrong, and what would be right.
    param: the field that is wrong, or None.
    code: a word for programs, or None.
    headers: of the answer.
  """

  def __init__(
    self,
    status: int,
    message: str,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
  ):
    super().__init__(message)
    self.status, self.message, self.param, self.code = status, message, param, code
    self.headers = dict(headers or {})

  def body(self) -> dict:
    """Returns {"error": {"message", "type", "param", "code"}}."""
    kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else None)
    return {
      "error": {
        "message": self.message,
        "type": kind or "invalid_request_error",
        "param": self.param,
        "code": self.code,
      }
    }


def refusal(message: str, param: str | None = None) -> ApiError:
  """Returns the error of a wrong value."""
  return ApiError(400, message, param, "invalid_value")


def internal() -> ApiError:
  """Returns the error of a fault of the server."""
  return ApiError(
    500, "the server has failed at this request; its log has the reason.", code="internal"
  )


def stopping() -> ApiError:
  """Returns the error of a server that ends."""
  return ApiError(503, "the server is stopping.", code="stopping")


def queue_full(limit: int, seconds: int) -> ApiError:
  """Returns the error of a queue in which `limit` requests wait, with a time to come again."""
  return ApiError(
    429,
    f"{limit} requests wait already: try again in {seconds} s.",
    code="queue_full",
    headers={"Retry-After": str(seconds)},
  )

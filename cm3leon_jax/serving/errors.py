"""Defines the errors of requests in the format of the OpenAI API."""

from collections.abc import Mapping

QUEUE_FULL = "queue_full"  # Code of an error to which the application adds Retry-After.
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
  """Error that is returned to the client instead of an answer.

  Attributes:
    message: one sentence that says what is wrong and what would be correct.
    param: wrong field of the request, or None.
    code: machine-readable name of the error, or None.
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
  """Returns the error for an invalid request, with status 400."""
  return ApiError(400, message, param, "invalid_value")


def internal() -> ApiError:
  """Returns the error for an internal failure of the server."""
  return ApiError(
    500, "the server failed to answer this request; its log has the reason.", code="internal"
  )


def stopping() -> ApiError:
  """Returns the error of a server that is stopping."""
  return ApiError(503, "the server is stopping.", code="stopping")

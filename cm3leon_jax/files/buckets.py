"""Sets timeouts for GCS buckets (gs://), and recognizes errors that come from GCS buckets.

Three libraries access GCS buckets: gcsfs, TensorStore and ArrayRecord.
"""

import importlib.util
import logging
import os
import re
import traceback

from cm3leon_jax.config import UserError, causes

CONNECT_SECONDS = 30
# A request fails, and is retried, after this many seconds without data from the server.
IDLE_SECONDS = 60
# Errors of these modules come from requests to a GCS bucket, by gcsfs or google-cloud-storage
# (which tensorboardX uses).
CLIENTS = ("aiohttp.", "gcsfs.", "google.api_core.", "google.auth.", "google.cloud.")
# These modules also raise errors of the library Requests. Other libraries use Requests for other
# downloads, so its errors count only if they passed through one of these modules.
CALLERS = ("gcsfs.", "google.")
# TensorStore and ArrayRecord (in C++) raise built-in exception types, and gcsfs sometimes does so,
# too. Only the text of such an error shows that it comes from a GCS bucket.
GIVEN_UP = re.compile(r"retry attempts failed|Retry policy exhausted|CURL error")
REFUSED = re.compile(
  r"^Forbidden: |PERMISSION_DENIED|UNAUTHENTICATED|\b(?:status|code|message of):? 40[13]\b"
)
ANSWERED = re.compile(rf"^Bad Request: |{REFUSED.pattern}")
# TensorStore reports PERMISSION_DENIED for local files, too.
LOCAL = re.compile(r'\blocal file "')
# Texts of errors for unknown host names, by aiohttp (which gcsfs uses), TensorStore and Requests.
UNRESOLVED = re.compile(r"^ClientConnectorDNSError: |Could not resolve host|NameResolutionError")
S3 = re.compile(r"s3[an]?://", re.IGNORECASE)


def prepare_access() -> None:
  """Sets timeouts and disables listing caches. Call it before the first access to a GCS bucket.

  By default, TensorStore (arrays of checkpoints, neighbors) waits as long as a connection is open,
  and gcsfs (all other files) waits five minutes and does not retry. With these timeouts, both retry
  a failed request with growing pauses, gcsfs 6 times and TensorStore 32 times, and then raise an
  error. ArrayRecord, which reads documents, sets its own timeouts.

  Listing caches of gcsfs would hide the files that other processes write. Environment variables and
  values in fsspec's config that the user has set take precedence.
  """
  for name, value in (
    ("CONNECT_TIMEOUT_SECONDS", CONNECT_SECONDS),
    ("LOW_SPEED_TIME_SECONDS", IDLE_SECONDS),
    ("LOW_SPEED_LIMIT_BYTES", 1),
  ):
    os.environ.setdefault(f"TENSORSTORE_CURL_{name}", str(value))
  if not importlib.util.find_spec("gcsfs"):
    return
  import aiohttp  # A dependency of gcsfs.
  import fsspec.config

  timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=IDLE_SECONDS)
  config = fsspec.config.conf.setdefault("gcs", {})
  config.setdefault("requests_timeout", timeout)
  config.setdefault("use_listings_cache", False)
  # gcsfs logs tracebacks of errors that it also raises.
  logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
  # google.auth warns of missing credentials, but gcsfs then tries anonymous access.
  logging.getLogger("google.auth").setLevel(logging.ERROR)


def failure(error: BaseException | None) -> str:
  """Returns why an access to a GCS bucket failed; "" if `error` has another cause.

  failure(HttpError("status 503"))
  "a GCS bucket did not answer, or answered with errors, until the last try (HttpError: ..."
  """
  if (found := _find(error)) is None:
    return ""
  what = "did not answer, or answered with errors, until the last try"
  if UNRESOLVED.search(f"{type(found).__name__}: {_text(found)}"):
    what = "was not reached: there is no network, or the host has a wrong name"
  elif refuses(found):
    what = "may not be read or written by this account"
  return f"a GCS bucket {what} ({type(found).__name__}: {_text(found)[:200] or 'no text'})"


def refuses(error: BaseException | None) -> bool:
  """Returns whether a GCS bucket denied permission, so that a retry cannot help."""
  if (found := _find(error)) is None:
    return False
  # gcsfs and Google's clients set `code`, aiohttp sets `status`.
  code = getattr(found, "code", None) or getattr(found, "status", None)
  no_account = type(found).__name__ == "DefaultCredentialsError"  # From google.auth.
  return no_account or str(code) in ("401", "403") or bool(REFUSED.search(_text(found)))


def _find(error: BaseException | None) -> BaseException | None:
  """Returns the first error of a GCS bucket among `error` and its causes, or None."""
  for found in causes(error):
    text, module = _text(found), f"{type(found).__module__}."
    if module.startswith(CLIENTS) or (module.startswith("requests.") and _is_of_caller(found)):
      return found
    is_answer = type(found) in (OSError, ValueError) and ANSWERED.match(text)
    if GIVEN_UP.search(text) or (is_answer and not LOCAL.search(text)):
      return found
  return None


def _is_of_caller(error: BaseException) -> bool:
  """Returns whether an error of Requests was raised through CALLERS or names a Google host."""
  frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
  names = [f"{frame.f_globals.get('__name__', '')}." for frame in frames]
  return any(name.startswith(CALLERS) for name in names) or ".googleapis.com" in str(error)


def _text(error: BaseException) -> str:
  return " ".join(str(error).split())


def check_path(path: str, name: str = "") -> None:
  """Raises UserError if a path is on S3, which ArrayRecord does not support.

  `path` may be any text. `name` is the flag or field that contains it, for the message.
  """
  if S3.match(path):
    raise UserError(
      f"{name}{'=' * bool(name)}{path} is on S3, which is not supported: give gs://BUCKET/FOLDER, "
      "or the local folder where the bucket is mounted."
    )

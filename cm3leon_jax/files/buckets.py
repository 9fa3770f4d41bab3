"""How buckets (gs://) are accessed, which three libraries read and write: no wait is endless."""

import importlib.util
import logging
import os
import re
import traceback

from cm3leon_jax.config import UserError, causes

CONNECT_SECONDS = 30
# Without a byte from the server for so long, a request fails, and is tried again.
IDLE_SECONDS = 60
# Modules whose errors are those of requests, by gcsfs and, for tensorboardX, google-cloud-storage.
CLIENTS = ("aiohttp.", "gcsfs.", "google.api_core.", "google.auth.", "google.cloud.")
# These two also raise errors of Requests, which other libraries use for their own downloads.
CALLERS = ("gcsfs.", "google.")
# TensorStore and ArrayRecord, in C++, raise errors of Python's own types, as gcsfs does for some.
GIVEN_UP = re.compile(r"retry attempts failed|Retry policy exhausted|CURL error")
REFUSED = re.compile(
  r"^Forbidden: |PERMISSION_DENIED|UNAUTHENTICATED|\b(?:status|code|message of):? 40[13]\b"
)
ANSWERED = re.compile(rf"^Bad Request: |{REFUSED.pattern}")
LOCAL = re.compile(r'\blocal file "')  # TensorStore refuses those of a disk by the same word.
# aiohttp, which gcsfs uses; TensorStore; Requests.
UNRESOLVED = re.compile(r"^ClientConnectorDNSError: |Could not resolve host|NameResolutionError")
S3 = re.compile(r"s3[an]?://", re.IGNORECASE)


def prepare_access() -> None:
  """Sets time-outs and what is remembered; call it before the first access to a bucket.

  Without them TensorStore (arrays of checkpoints, neighbors) waits as long as a connection lives,
  and gcsfs (all other files) five minutes, after which it does not try again. Both repeat a request
  that failed with growing pauses, gcsfs 6 times and TensorStore 32 times, and then raise.
  ArrayRecord, which reads documents, has time-outs of its own.

  gcsfs would also remember what a folder holds: a process would not see the files of another one.
  Variables and values of fsspec's config that are set already count.
  """
  for name, value in (
    ("CONNECT_TIMEOUT_SECONDS", CONNECT_SECONDS),
    ("LOW_SPEED_TIME_SECONDS", IDLE_SECONDS),
    ("LOW_SPEED_LIMIT_BYTES", 1),
  ):
    os.environ.setdefault(f"TENSORSTORE_CURL_{name}", str(value))
  if not importlib.util.find_spec("gcsfs"):
    return
  import aiohttp  # gcsfs needs it.
  import fsspec.config

  timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=IDLE_SECONDS)
  config = fsspec.config.conf.setdefault("gcs", {})
  config.setdefault("requests_timeout", timeout)
  config.setdefault("use_listings_cache", False)
  # It would log the traceback of an error that it raises, too.
  logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
  # It would warn of credentials that it does not find, and gcsfs then tries without any.
  logging.getLogger("google.auth").setLevel(logging.ERROR)


def failure(error: BaseException | None) -> str:
  """Says why an access to a bucket failed, if `error` comes of that; "" if it does not.

  failure(HttpError("status 503"))
  "a bucket did not answer, or answered with errors, until the last try (HttpError: status 503)"
  """
  if (found := _find(error)) is None:
    return ""
  what = "did not answer, or answered with errors, until the last try"
  if UNRESOLVED.search(f"{type(found).__name__}: {_text(found)}"):
    what = "was not reached: there is no network, or the host has a wrong name"
  elif refuses(found):
    what = "may not be read or written by this account"
  return f"a bucket {what} ({type(found).__name__}: {_text(found)[:200] or 'no text'})"


def refuses(error: BaseException | None) -> bool:
  """Returns whether an access to a bucket failed for want of rights, which no new try mends."""
  if (found := _find(error)) is None:
    return False
  code = getattr(found, "code", None) or getattr(found, "status", None)  # gcsfs, Google; aiohttp.
  no_account = type(found).__name__ == "DefaultCredentialsError"  # Of google.auth.
  return no_account or str(code) in ("401", "403") or bool(REFUSED.search(_text(found)))


def _find(error: BaseException | None) -> BaseException | None:
  """Returns the error of an access to a bucket that led to `error`; None if there is none."""
  for found in causes(error):
    text, module = _text(found), f"{type(found).__module__}."
    if module.startswith(CLIENTS) or (module.startswith("requests.") and _is_of_caller(found)):
      return found
    is_answer = type(found) in (OSError, ValueError) and ANSWERED.match(text)
    if GIVEN_UP.search(text) or (is_answer and not LOCAL.search(text)):
      return found
  return None


def _is_of_caller(error: BaseException) -> bool:
  """Returns whether an error of Requests passed through one of CALLERS, or names Google's host."""
  frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
  names = [f"{frame.f_globals.get('__name__', '')}." for frame in frames]
  return any(name.startswith(CALLERS) for name in names) or ".googleapis.com" in str(error)


def _text(error: BaseException) -> str:
  return " ".join(str(error).split())


def check_path(path: str, name: str = "") -> None:
  """Raises UserError if a path is on S3, from which ArrayRecord reads no documents.

  Args:
    path: any text.
    name: of its flag or field, for the message.
  """
  if S3.match(path):
    raise UserError(
      f"{name}{'=' * bool(name)}{path} is on S3, which is not supported: give gs://BUCKET/FOLDER, "
      "or the local folder where the bucket is mounted."
    )

"""How buckets (gs://) are accessed, which three libraries read and write: no wait is endless."""

import importlib.util
import logging
import os
import re

from cm3leon_jax.config import UserError

CONNECT_SECONDS = 30
# Without a byte from the server for so long, a request fails, and is tried again.
IDLE_SECONDS = 60
# Modules whose errors are those of requests, by gcsfs and, for tensorboardX, google-cloud-storage.
CLIENTS = ("aiohttp.", "gcsfs.", "google.api_core.", "google.auth.", "google.cloud.", "requests.")
# TensorStore and ArrayRecord, in C++, raise errors of Python's own types, as gcsfs does for a 403.
GIVEN_UP = re.compile(r"retry attempts failed|Retry policy exhausted|CURL error")
FORBIDDEN = re.compile(r"^Forbidden: |PERMISSION_DENIED|UNAUTHENTICATED|\b40[13]\b")
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


def failure(error: BaseException | None) -> str:
  """Says why an access to a bucket failed, if `error` comes of that; "" if it does not.

  failure(HttpError("status 503"))
  "a bucket did not answer, or with errors, until the last try (HttpError: status 503)"
  """
  while error is not None:
    text = " ".join(str(error).split())
    client = f"{type(error).__module__}.".startswith(CLIENTS)
    given_up = GIVEN_UP.search(text)
    if client or given_up or (type(error) in (OSError, ValueError) and FORBIDDEN.match(text)):
      what = "did not answer, or with errors, until the last try"
      if FORBIDDEN.search(text):
        what = "may not be read or written by this account"
      return f"a bucket {what} ({type(error).__name__}: {text[:200] or 'no text'})"
    error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
  return ""


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

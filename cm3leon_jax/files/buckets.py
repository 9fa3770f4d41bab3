"""Sets timeouts for GCS buckets (gs://), and recognizes errors of disks and GCS buckets.

Three libraries access GCS buckets: gcsfs, TensorStore and ArrayRecord.
"""

import errno
import importlib.util
import logging
import os
import re

from cm3leon_jax.errors import UserError, causes

CONNECT_SECONDS = 30
# A request fails, and is retried, after this many seconds without data from the server.
IDLE_SECONDS = 60
# Errors of these modules come from requests to a GCS bucket.
CLIENTS = ("aiohttp.", "gcsfs.", "google.", "requests.")
# Of TensorStore, ArrayRecord (both in C++) and gcsfs, which also raise built-in exceptions.
LIBRARY = re.compile(
  r"^(PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE|ABORTED|DEADLINE_EXCEEDED): "
  r"|^(Forbidden|Bad Request|\w+\(\) failed): |retry attempts failed|Retry policy exhausted"
  r"|CURL error|os_error_code="
)
# Values of errno that say nothing about a file's content: the disk is full or fails, or access is
# denied.
NOT_READ = (
  errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EACCES,
  errno.EPERM, errno.EMFILE, errno.ENFILE, errno.EROFS,
)  # fmt: skip
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
  """Returns the message of the error of a disk or GCS bucket among `error` and its causes, or "".

  failure(HttpError("status 503")) = "HttpError: status 503"
  """
  for found in causes(error):
    of_library = type(found) in (OSError, ValueError, RuntimeError) and LIBRARY.search(str(found))
    if (
      of_library
      or f"{type(found).__module__}.".startswith(CLIENTS)
      or (isinstance(found, OSError) and found.errno in NOT_READ)
    ):
      return f"{type(found).__name__}: {found}"
  return ""


def check_path(path: str) -> None:
  """Raises UserError if a path is on S3, which ArrayRecord does not support."""
  if S3.match(path):
    raise UserError(f"{path} is on S3, which is not supported: give gs://BUCKET/FOLDER.")

"""How buckets (gs://) are accessed, which three libraries read and write: no wait is endless."""

import importlib.util
import os

CONNECT_SECONDS = 30
# Without a byte from the server for so long, a request fails, and is tried again.
IDLE_SECONDS = 60


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

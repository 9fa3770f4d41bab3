"""Serves a trained model over HTTP with an OpenAI-style API and a web page to try it.

  cm3leon serve --workdir=scenes-instruct
  cm3leon serve --workdir=workdir/scenes --port=8080 --slots=16
  CM3LEON_TOKEN=a-long-secret cm3leon serve --workdir=scenes --host=0.0.0.0

--workdir is the workdir of a run, the folder of a bundle, or the name of an installed bundle. The
command needs no config. It prints its address when it is ready, and a line for each request. It
keeps compiled programs for the next start (--cache_dir). docs/serving.md describes the requests.
"""

from collections.abc import Callable
import importlib.util
import os
import sys

from absl import flags
from etils import epath, epy

from cm3leon_jax import extras
from cm3leon_jax.commands import common, interrupts, program_cache
from cm3leon_jax.errors import UserError

with epy.lazy_imports():
  from cm3leon_jax import api
  from cm3leon_jax.serving import engine as engine_lib
  from cm3leon_jax.serving.web import limits as limits_lib
  from cm3leon_jax.serving.web import server

TOKEN = "CM3LEON_TOKEN"
NEEDED = ("starlette", "uvicorn", "python_multipart")
_HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen on; 0.0.0.0: all addresses.")
_PORT = flags.DEFINE_integer("port", 8000, "Port to listen on; 0 selects a free port.", 0, 65_535)
_SLOTS = flags.DEFINE_integer(
  "slots", 8, "Number of samples per bucket that are generated together.", lower_bound=1
)
_CHUNK = flags.DEFINE_integer(
  "chunk",
  16,
  "Decoding steps per chunk. After each chunk, partial results are sent and requests are admitted.",
  lower_bound=1,
)
_BUCKETS = flags.DEFINE_integer(
  "buckets",
  16,
  "Largest number of decoding shapes that run in turn; each has memory for --slots samples.",
  lower_bound=1,
)
_MOST_WAITING = flags.DEFINE_integer(
  "most_waiting", 64, "Requests that may wait; further requests get status 429.", lower_bound=1
)
_MOST_SAMPLES = flags.DEFINE_integer(
  "most_samples", 8, "Largest number of samples per request.", lower_bound=1
)
_SECONDS = flags.DEFINE_float(
  "request_seconds", 120.0, "Seconds after which a request gets status 504.", lower_bound=1.0
)
_STOP_SECONDS = flags.DEFINE_integer(
  "stop_seconds", 30, "Seconds after SIGTERM until running requests are aborted.", lower_bound=1
)
_UPLOAD = flags.DEFINE_integer(
  "upload_mib", 16, "Largest body of a request, in MiB.", lower_bound=1, upper_bound=1024
)
_WEIGHT_DTYPE = flags.DEFINE_enum(
  "weight_dtype", "compute", ("compute", "int8"), "Dtype of the model's matrices."
)
_CACHE_DTYPE = flags.DEFINE_enum(
  "cache_dtype", "compute", ("compute", "int8"), "Dtype of the cache entries."
)


def _token() -> str:
  """Returns the token that requests must contain, or "". Raises UserError for an invalid token."""
  token = os.environ.get(TOKEN, "")
  if token and not (
    token.isascii() and token.isprintable() and len(token) >= 8 and " " not in token
  ):
    raise UserError(
      f"{TOKEN} must contain a token of at least 8 printable characters without spaces."
    )
  return token


def main(workdir: epath.Path) -> None:
  for package in NEEDED:
    if importlib.util.find_spec(package) is None:
      raise UserError(f"cm3leon serve needs {package}: {extras.install('serve')}.")
  token = _token()
  if not token and not limits_lib.is_loopback(_HOST.value):
    print(
      f"warning: anyone who can reach --host={_HOST.value} may use this server: set {TOKEN}.",
      file=sys.stderr,
    )
  with program_cache.kept() as store:
    _serve(workdir, token, store)
  interrupts.end(0, "")  # Python would need seconds, and XLA's threads may crash while it exits.


def _serve(workdir: epath.Path, token: str, store: Callable[[], object]) -> None:
  """Loads the model, and serves until a signal arrives."""
  name = os.path.basename(os.path.normpath(os.fspath(workdir))) or "model"
  opened = server.listen(_HOST.value, _PORT.value)
  model = api.CM3Leon.load(
    os.fspath(workdir),
    batch_size=_SLOTS.value,
    weight_dtype=_WEIGHT_DTYPE.value,
    cache_dtype=_CACHE_DTYPE.value,
  )
  limits = limits_lib.Limits(
    most_samples=_MOST_SAMPLES.value,
    most_bytes=_UPLOAD.value * 2**20,
    all_bytes=16 * _UPLOAD.value * 2**20,
    seconds=_SECONDS.value,
    token=token,
  )
  engine = engine_lib.Engine(
    model.pipeline,
    model.mesh,
    slots=_SLOTS.value,
    chunk=_CHUNK.value,
    buckets=_BUCKETS.value,
    queue_limit=_MOST_WAITING.value,
    store=store,
  )
  print(
    "compiling or loading the first programs; on a CPU this takes minutes at the first start.",
    file=sys.stderr,
    flush=True,
  )
  server.serve(engine, name, limits, _HOST.value, opened, _STOP_SECONDS.value)


if __name__ == "__main__":
  common.run(main, config=False)

"""Serves a trained model over HTTP with an OpenAI-style API and a web page to try it.

  cm3leon serve --workdir=scenes-instruct
  cm3leon serve --workdir=workdir/scenes --port=8080 --slots=16
  CM3LEON_TOKEN=a-long-secret cm3leon serve --workdir=scenes --host=0.0.0.0

--workdir is the workdir of a run, the folder of a bundle, or the name of an installed bundle. The
command needs no config. It prints its address when it is ready, and a line for each request. It
keeps compiled programs for the next start (--cache_dir). docs/serving.md describes the requests.
"""

from collections.abc import Callable
import dataclasses
import importlib.util
import os
import sys
from typing import Annotated

from etils import epath, epy
from pydantic import Field, PositiveInt

from cm3leon_jax import extras
from cm3leon_jax.commands import common, interrupts, shared_flags
from cm3leon_jax.errors import UserError

with epy.lazy_imports():
  from cm3leon_jax import api
  from cm3leon_jax.files import programs
  from cm3leon_jax.serving import engine as engine_lib
  from cm3leon_jax.serving.web import limits as limits_lib
  from cm3leon_jax.serving.web import server

TOKEN = "CM3LEON_TOKEN"
NEEDED = ("starlette", "uvicorn", "python_multipart")


@dataclasses.dataclass(frozen=True)
class Flags(shared_flags.Programs):
  host: str = "127.0.0.1"
  """Address to listen on; 0.0.0.0: all addresses."""
  port: Annotated[int, Field(ge=0, le=65_535)] = 8000
  """Port to listen on; 0 selects a free port."""
  slots: PositiveInt = 8
  """Number of samples per bucket that are generated together."""
  chunk: PositiveInt = 16
  """Decoding steps per chunk. After each chunk, partial results are sent and requests are
  admitted."""
  buckets: PositiveInt = 16
  """Largest number of decoding shapes that run in turn; each has memory for --slots samples."""
  most_waiting: PositiveInt = 64
  """Requests that may wait; further requests get status 429."""
  most_samples: PositiveInt = 8
  """Largest number of samples per request."""
  request_seconds: Annotated[float, Field(ge=1.0)] = 120.0
  """Seconds after which a request gets status 504."""
  stop_seconds: PositiveInt = 30
  """Seconds after SIGTERM until running requests are aborted."""
  upload_mib: Annotated[int, Field(ge=1, le=1024)] = 16
  """Largest body of a request, in MiB."""


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


def main(workdir: epath.Path, flags: Flags) -> None:
  for package in NEEDED:
    if importlib.util.find_spec(package) is None:
      raise UserError(f"cm3leon serve needs {package}: {extras.install('serve')}.")
  token = _token()
  if not token and not limits_lib.is_loopback(flags.host):
    print(
      f"warning: anyone who can reach --host={flags.host} may use this server: set {TOKEN}.",
      file=sys.stderr,
    )
  with programs.kept(flags.cache_dir) as store:
    _serve(workdir, flags, token, store)
  interrupts.end(0, "")  # Python would need seconds, and XLA's threads may crash while it exits.


def _serve(workdir: epath.Path, flags: Flags, token: str, store: Callable[[], object]) -> None:
  """Loads the model, and serves until a signal arrives."""
  name = os.path.basename(os.path.normpath(os.fspath(workdir))) or "model"
  opened = server.listen(flags.host, flags.port)
  model = api.CM3Leon.load(
    os.fspath(workdir),
    batch_size=flags.slots,
    weight_dtype=flags.weight_dtype,
    cache_dtype=flags.cache_dtype,
  )
  limits = limits_lib.Limits(
    most_samples=flags.most_samples,
    most_bytes=flags.upload_mib * 2**20,
    all_bytes=16 * flags.upload_mib * 2**20,
    seconds=flags.request_seconds,
    token=token,
  )
  engine = engine_lib.Engine(
    model.pipeline,
    model.mesh,
    slots=flags.slots,
    chunk=flags.chunk,
    buckets=flags.buckets,
    queue_limit=flags.most_waiting,
    store=store,
  )
  print(
    "compiling or loading the first programs; on a CPU this takes minutes at the first start.",
    file=sys.stderr,
    flush=True,
  )
  server.serve(engine, name, limits, flags.host, opened, flags.stop_seconds)


if __name__ == "__main__":
  common.run(main, Flags, config=False)

"""Serves a trained model over HTTP, in the shape of the OpenAI API, with a page to try it.

  cm3leon serve --workdir=scenes-instruct
  cm3leon serve --workdir=workdir/scenes --port=8080 --slots=16
  CM3LEON_TOKEN=a-long-secret cm3leon serve --workdir=scenes --host=0.0.0.0

It needs no config: --workdir is the workdir of a run, the folder of a bundle, or the name of a
bundle that is installed. It prints its address when it is ready. Compiled programs are kept for the
next start (--cache_dir). Each request is a line on stderr. docs/serving.md has the requests.
"""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import sys
from typing import TYPE_CHECKING

from absl import flags

from cm3leon_jax import extras
from cm3leon_jax.commands import common
from cm3leon_jax.config import UserError

if TYPE_CHECKING:
  from etils import epath


TOKEN = "CM3LEON_TOKEN"
NEEDED = ("starlette", "uvicorn", "python_multipart")
_HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen at; 0.0.0.0: all of them.")
_PORT = flags.DEFINE_integer("port", 8000, "Port; 0 takes a free one.", 0, 65_535)
_SLOTS = flags.DEFINE_integer(
  "slots", 8, "Samples of one shape that are generated at once.", lower_bound=1
)
_CHUNK = flags.DEFINE_integer(
  "chunk", 8, "Tokens of each sample between two answers; then requests begin.", lower_bound=1
)
_BUCKETS = flags.DEFINE_integer(
  "buckets", 8, "Shapes that are decoded in turn, each with memory for --slots.", lower_bound=1
)
_LANES = flags.DEFINE_integer("lanes", None, "Deprecated name of --buckets.", lower_bound=1)
_MOST_WAITING = flags.DEFINE_integer(
  "most_waiting", 64, "Requests that may wait; more are refused with 429.", lower_bound=1
)
_MOST_SAMPLES = flags.DEFINE_integer(
  "most_samples", 8, "Largest number of samples of a request.", lower_bound=1
)
_SECONDS = flags.DEFINE_float(
  "request_seconds", 120.0, "Seconds after which a request is answered with 504.", lower_bound=1.0
)
_STOP_SECONDS = flags.DEFINE_integer(
  "stop_seconds", 30, "Seconds that requests under way have to end after SIGTERM.", lower_bound=1
)
_UPLOAD = flags.DEFINE_integer(
  "upload_mib", 16, "Largest body of a request, MiB.", lower_bound=1, upper_bound=1024
)
_PIXELS = flags.DEFINE_float(
  "upload_megapixels", 16.0, "Largest image, millions of pixels.", lower_bound=0.01, upper_bound=32
)
_TOKEN_FILE = flags.DEFINE_string(
  "token_file",
  None,
  f"File with a token that requests must bear; or set the variable {TOKEN}. Default: none.",
)
_CACHE_DIR = flags.DEFINE_string(
  "cache_dir",
  None,
  "Folder that keeps compiled programs for the next start; empty: none. Default: that of "
  "JAX_COMPILATION_CACHE_DIR, else cm3leon_jax/programs in the user's folder for caches.",
)
_WEIGHT_DTYPE = flags.DEFINE_enum(
  "weight_dtype", "compute", ("compute", "int8"), "Dtype of the model's matrices."
)
_CACHE_DTYPE = flags.DEFINE_enum(
  "cache_dtype", "compute", ("compute", "int8"), "Dtype of keys and values."
)


def _token() -> str:
  """Returns the token that requests must bear, or "". Raises UserError at an unreadable file."""
  if _TOKEN_FILE.value is None:
    token = os.environ.get(TOKEN, "")
    where = TOKEN
  else:
    where = f"--token_file={_TOKEN_FILE.value}"
    try:
      with open(_TOKEN_FILE.value, encoding="utf-8") as file:
        token = file.read().strip()
    except (OSError, UnicodeDecodeError) as error:
      raise UserError(f"{where} cannot be read: name a file with one line of text.") from error
  if (token or _TOKEN_FILE.value is not None) and not (
    token.isascii() and token.isprintable() and len(token) >= 8 and " " not in token
  ):
    raise UserError(f"{where} must hold a token of at least 8 printable characters, no spaces.")
  return token


def _check_host(host: str) -> None:
  try:
    ipaddress.ip_address(host)
  except ValueError as error:
    if host != "localhost":
      raise UserError(f"--host is {host}; it must be an address such as 127.0.0.1.") from error


def _buckets() -> int:
  """Returns --buckets, also if it has its name of before. Raises UserError if it has both."""
  if _LANES.value is None:
    return _BUCKETS.value
  if _BUCKETS.present:
    raise UserError("--lanes is the name that --buckets had: give --buckets alone.")
  print("warning: --lanes is deprecated: its name is --buckets now.", file=sys.stderr)
  return _LANES.value


def main(workdir: epath.Path) -> None:
  for package in NEEDED:
    if importlib.util.find_spec(package) is None:
      raise UserError(f"cm3leon serve needs {package}: {extras.install('serve')}.")
  _check_host(_HOST.value)
  token, buckets = _token(), _buckets()
  from cm3leon_jax.api import CM3Leon
  from cm3leon_jax.serving import program_cache
  from cm3leon_jax.serving.engine import Engine
  from cm3leon_jax.serving.web import request_log, server
  from cm3leon_jax.serving.web.limits import Limits, is_loopback

  if not token and not is_loopback(_HOST.value):
    print(
      f"warning: whoever reaches --host={_HOST.value} may use this server: set {TOKEN} or "
      "--token_file.",
      file=sys.stderr,
    )
  if warning := program_cache.keep_programs(_CACHE_DIR.value):
    print(f"warning: {warning}", file=sys.stderr)
  opened = server.listen(_HOST.value, _PORT.value)
  model = CM3Leon.load(
    os.fspath(workdir),
    batch_size=_SLOTS.value,
    weight_dtype=_WEIGHT_DTYPE.value,
    cache_dtype=_CACHE_DTYPE.value,
  )
  limits = Limits(
    most_samples=_MOST_SAMPLES.value,
    most_bytes=_UPLOAD.value * 2**20,
    all_bytes=16 * _UPLOAD.value * 2**20,
    most_pixels=int(_PIXELS.value * 1e6),
    seconds=_SECONDS.value,
    token=token,
  )
  engine = Engine(
    model.pipeline,
    model.mesh,
    slots=_SLOTS.value,
    chunk=_CHUNK.value,
    buckets=buckets,
    queue_limit=_MOST_WAITING.value,
  )
  print(
    "compiling the programs, or reading them: on a CPU the first start takes minutes.",
    file=sys.stderr,
    flush=True,
  )
  request_log.show()
  name = os.path.basename(os.path.normpath(model.workdir)) or "model"
  server.serve(engine, name, limits, _HOST.value, opened, _STOP_SECONDS.value)


if __name__ == "__main__":
  common.run(main, config=False)

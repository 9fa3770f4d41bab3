"""Tests GCS requests without an answer, in new processes, which read other time-outs."""

import contextlib
import errno
import io as io_lib
import json
import os
import pathlib
import subprocess
import sys
import threading

import numpy as np
from PIL import Image
import pytest

from cm3leon_jax.errors import TryAgain, UserError
from cm3leon_jax.files import atomic, buckets
from tests import bucket_server
from tests.launched import SCENES
from tests.refusals import refused

ROOT = pathlib.Path(__file__).parents[1]
BEGIN = """
import sys, time
from cm3leon_jax.files import buckets
buckets.IDLE_SECONDS = 1
buckets.prepare_access()
"""
TENSORSTORE = """
import tensorstore
kvstore = {"driver": "gcs", "bucket": "bucket", "path": "file"}
store = tensorstore.KvStore.open(kvstore).result()
print(bytes(store.read("").result().value))
"""
GCSFS = """
from etils import epath
folder = epath.Path("gs://bucket")
print((folder / "file").read_bytes())
assert [path.name for path in folder.iterdir()] == ["file"]
print("listed", flush=True)
sys.stdin.readline()  # Meanwhile another process writes a file.
print(sorted(path.name for path in folder.iterdir()), (folder / "other").exists())
"""


@pytest.fixture
def server():
  with contextlib.closing(bucket_server.Server()) as server:
    server.put("bucket", "file", b"whole", None)
    yield server


def run(server, code):
  """Starts a process whose TensorStore time-outs are not those of the tests."""
  env = {name: value for name, value in os.environ.items() if "TENSORSTORE_CURL" not in name}
  env["PYTHONPATH"] = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
  pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
  command = [sys.executable, "-c", BEGIN + code]
  return subprocess.Popen(command, env=env | server.environment(), text=True, **pipes)


IMAGE = """
from cm3leon_jax.data.raw.reader import load_image
print(load_image("gs://bucket/image.png", None).shape)
"""


def test_the_bytes_of_an_image_take_one_request(server):
  """By default, gcsfs would send one request per few kilobytes."""
  pytest.importorskip("gcsfs")
  noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
  file = io_lib.BytesIO()
  Image.fromarray(noise).save(file, "PNG")
  server.put("bucket", "image.png", file.getvalue(), None)
  output, errors = run(server, IMAGE).communicate(timeout=300)
  assert output == "(256, 256, 3)\n", errors
  assert sum("alt=media" in path for _, path in server.requests) == 1


def hang_then_fail(server, part=""):
  """Lets the first request of a path with `part` hang until the event; the second one fails.

  Returns:
    The list of these requests' paths, and the event.
  """
  asked, stop = [], threading.Event()

  def fault(method, path):
    if part not in path:
      return None
    asked.append(path)
    if len(asked) == 1:
      stop.wait(120)
    return 503 if len(asked) == 2 else None

  server.fault = fault
  return asked, stop


@pytest.mark.slow
def test_an_array_whose_request_is_not_answered_is_asked_for_again(server):
  """Without a time-out, TensorStore would wait as long as the connection is open."""
  asked, stop = hang_then_fail(server)
  output, errors = run(server, TENSORSTORE).communicate(timeout=300)
  stop.set()
  assert output == "b'whole'\n", errors
  assert len(asked) >= 3


@pytest.mark.slow
def test_a_file_whose_request_is_not_answered_is_asked_for_again(server):
  """Listing the folder again shows a file that another process has written since."""
  pytest.importorskip("gcsfs")  # In the extra [data].
  asked, stop = hang_then_fail(server, "alt=media")
  job = run(server, GCSFS)
  assert job.stdout.readline() == "b'whole'\n"
  stop.set()
  assert len(asked) == 3
  assert job.stdout.readline() == "listed\n"
  server.put("bucket", "other", b"", None)
  output, errors = job.communicate("go on\n", timeout=300)
  assert output == "['file', 'other'] True\n", errors


# Program that prints TensorStore's message after its last try, here the second.
GIVES_UP = """
retries = {"max_retries": 1, "initial_delay": "10ms", "max_delay": "10ms"}
kvstore = {"driver": "gcs", "bucket": "bucket", "path": "file"}
import tensorstore
store = tensorstore.KvStore.open({**kvstore, "context": {"gcs_request_retries": retries}}).result()
try:
  store.read("").result()
except Exception as error:
  print(buckets.failure(error))
"""


@pytest.mark.parametrize(
  ("status", "message"),
  [
    (503, "ValueError: ABORTED: All "),
    pytest.param(403, "ValueError: PERMISSION_DENIED: ", marks=pytest.mark.slow),
  ],
)
def test_the_message_of_an_array_in_a_bucket_that_fails_is_known(server, status, message):
  server.fault = lambda method, path: status
  output, errors = run(server, GIVES_UP).communicate(timeout=300)
  assert output.startswith(message), output + errors


def test_the_errors_of_disks_and_clients_are_known_also_as_causes():
  aiohttp, retry = pytest.importorskip("aiohttp"), pytest.importorskip("gcsfs.retry")
  exceptions = pytest.importorskip("google.api_core.exceptions")
  for error in (
    retry.HttpError({"code": 503, "message": "status 503"}),
    OSError("Forbidden: b/bucket/o"),
    aiohttp.SocketTimeoutError(),
    exceptions.RetryError("Timeout of 120.0s", None),
    ValueError("Bad Request: b/o"),
    RuntimeError("Retry policy exhausted, with a last message of 503"),
    OSError(errno.ENOSPC, "No space left on device", "x"),
    PermissionError(errno.EACCES, "Permission denied", "x"),
    ValueError("OUT_OF_RANGE: Failed writing: \"/a\": File too large [os_error_code='27']"),
    RuntimeError("open() failed: Read-only file system; opening /w/x.partial"),
  ):
    outer = UserError("The file is damaged.")
    outer.__cause__ = error
    for raised in (error, outer, ExceptionGroup("writes", [ValueError("a"), error])):
      assert buckets.failure(raised) == f"{type(error).__name__}: {error}"
  circle = ValueError("first"), ValueError("second")
  circle[0].__cause__, circle[1].__cause__ = circle[1], circle[0]
  for error in (
    FileNotFoundError(errno.ENOENT, "No such file", "x"),
    ValueError("it is a Bad Request: no"),
    json.JSONDecodeError("UNAVAILABLE: ", "", 0),
    circle[0],
    None,
  ):
    assert not buckets.failure(error)


FILES_BELOW = """
from etils import epath
from cm3leon_jax.weights import sealing
print(sealing.files_below(epath.Path("gs://bucket/step")))
"""


@pytest.mark.slow
def test_a_folder_of_a_checkpoint_whose_request_fails_is_no_file(server):
  """Otherwise `is_dir` would return False, and the checkpoint would be taken for damaged."""
  pytest.importorskip("gcsfs")
  server.put("bucket", "step/state/array", b"", None)
  output, errors = run(server, FILES_BELOW).communicate(timeout=300)
  assert output == "['state/array']\n", errors
  # gcsfs does not retry after 403.
  server.fault = lambda method, path: 403 if "state" in path else None
  output, errors = run(server, FILES_BELOW).communicate(timeout=300)
  assert (output, errors.splitlines()[-2]) == ("", "OSError: Forbidden: b/bucket/o"), errors


@pytest.mark.slow
def test_a_stage_whose_bucket_is_gone_ends_with_one_sentence(server):
  """Takes half a minute, because gcsfs tries a request 6 times."""
  server.fault = lambda method, path: 503
  code = "from cm3leon_jax.commands import prepare_data as stage\nstage.common.run(stage.main)"
  flags = [f"--config={SCENES}", "--workdir=gs://bucket/run", "--config.raw.source=gs://bucket/in"]
  job = run(server, f"sys.argv += {flags}\n{code}")
  _, errors = job.communicate(timeout=300)
  assert job.returncode == TryAgain.exit_code
  assert errors.startswith("error: HttpError: ")
  assert errors.count("\n") == 1


def test_s3_is_refused_by_name():
  for path in ("s3://bucket/run", "S3a://bucket", "s3n://b/c"):
    for check in (buckets.check_path, atomic.open_filesystem):
      with refused(UserError, path, "S3"):
        check(path)
  for path in ("gs://s3/run", "runs/s3", "s3:/run", "ray://s3"):
    buckets.check_path(path)

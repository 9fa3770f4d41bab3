"""Tests GCS requests without an answer, in new processes, which read other time-outs."""

import contextlib
import io as io_lib
import os
import pathlib
import subprocess
import sys
import threading

import numpy as np
from PIL import Image
import pytest

from cm3leon_jax.config import TryAgain, UserError
from cm3leon_jax.files import atomic, buckets
from tests import bucket_server
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


@pytest.mark.slow
def test_an_array_whose_request_is_not_answered_is_asked_for_again(server):
  """Without a time-out, TensorStore would wait as long as the connection is open."""
  asked, stop = [], threading.Event()

  def fault(method, path):
    asked.append(path)
    if len(asked) == 1:
      stop.wait(120)
    return 503 if len(asked) == 2 else None

  server.fault = fault
  output, errors = run(server, TENSORSTORE).communicate(timeout=300)
  stop.set()
  assert output == "b'whole'\n", errors
  assert len(asked) >= 3


@pytest.mark.slow
def test_a_file_whose_request_is_not_answered_is_asked_for_again(server):
  """Listing the folder again shows a file that another process has written since."""
  pytest.importorskip("gcsfs")  # In the extra [data].
  asked, stop = [], threading.Event()

  def fault(method, path):
    if "alt=media" in path:
      asked.append(path)
      if len(asked) == 1:
        stop.wait(120)
      return 503 if len(asked) == 2 else None
    return None

  server.fault = fault
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
  ("status", "sentence"),
  [
    (
      503,
      "a GCS bucket did not answer, or answered with errors, until the last try (ValueError: "
      "ABORTED: All ",
    ),
    pytest.param(
      403,
      "a GCS bucket may not be read or written by this account (ValueError: PERMISSION_DENIED: ",
      marks=pytest.mark.slow,
    ),
  ],
)
def test_what_an_array_in_a_bucket_that_fails_says_is_known(server, status, sentence):
  server.fault = lambda method, path: status
  output, errors = run(server, GIVES_UP).communicate(timeout=300)
  assert output.startswith(sentence), output + errors


UNKNOWN_HOST = """
import asyncio
import aiohttp
async def ask():
  async with aiohttp.ClientSession() as session:
    await session.get("http://bucket.invalid")
try:
  asyncio.run(ask())
except Exception as error:
  print(buckets.failure(error))
"""


def test_a_host_that_cannot_be_resolved_is_said(server):
  pytest.importorskip("aiohttp")
  output, errors = run(server, UNKNOWN_HOST).communicate(timeout=300)
  assert output.startswith(
    "a GCS bucket was not reached: there is no network, or the host has a wrong name "
    "(ClientConnectorDNSError: Cannot connect to host bucket.invalid:80 "
  ), errors
  curl = ValueError("UNAVAILABLE: CURL error: Could not resolve host: storage.googleapis.com")
  assert buckets.failure(curl).startswith("a GCS bucket was not reached: there is no network, or ")


def test_the_errors_of_the_clients_are_known():
  """Covers the errors of each client from a server that answers 503 or 403, or not at all."""
  aiohttp, retry = pytest.importorskip("aiohttp"), pytest.importorskip("gcsfs.retry")
  exceptions = pytest.importorskip("google.api_core.exceptions")
  gone = "a GCS bucket did not answer, or answered with errors, until the last try"
  forbidden = "a GCS bucket may not be read or written by this account"
  # The error of ArrayRecord.
  exhausted = RuntimeError("Retry policy exhausted, with a last message of 503")
  for error, reason in (
    (
      retry.HttpError({"code": 503, "message": "status 503"}),
      f"{gone} (HttpError: status 503, 503)",
    ),
    (retry.HttpError({"code": 401, "message": "no"}), f"{forbidden} (HttpError: no, 401)"),
    (OSError("Forbidden: b/bucket/o\nno"), f"{forbidden} (OSError: Forbidden: b/bucket/o no)"),
    (aiohttp.SocketTimeoutError(), f"{gone} (SocketTimeoutError: no text)"),
    (exceptions.RetryError("Timeout of 120.0s", None), f"{gone} (RetryError: Timeout of 120.0s, "),
    (ValueError("Bad Request: b/o\ninvalid"), f"{gone} (ValueError: Bad Request: b/o invalid)"),
    (exhausted, f"{gone} (RuntimeError: Retry policy exhausted, with a last message of 503)"),
  ):
    assert buckets.failure(error).startswith(reason)
    outer = UserError("The file is damaged.")
    outer.__cause__ = error
    assert buckets.failure(outer).startswith(reason)
  for error in (
    FileNotFoundError("gs://bucket/file"),
    PermissionError(13, "Permission denied"),
    ValueError("it is a Bad Request: no"),
    None,
  ):
    assert not buckets.failure(error)


def test_an_error_that_no_new_try_mends_is_known():
  retry, auth = pytest.importorskip("gcsfs.retry"), pytest.importorskip("google.auth.exceptions")
  exceptions = pytest.importorskip("google.api_core.exceptions")
  for error, expected in (
    (retry.HttpError({"code": 401, "message": "Anonymous caller"}), True),
    (retry.HttpError({"code": 503, "message": "object 403 of 500"}), False),
    (exceptions.Forbidden("no"), True),
    (exceptions.ServiceUnavailable("no"), False),
    (OSError("Forbidden: b/bucket/o\nno"), True),
    (ValueError("Bad Request: b/bucket/o\ninvalid"), False),
    (ValueError("PERMISSION_DENIED: All retry attempts failed"), True),
    (RuntimeError("Retry policy exhausted, with a last message of 503"), False),
    (auth.DefaultCredentialsError("no credentials"), True),
    (auth.TransportError("no route"), False),
    (PermissionError(13, "Permission denied"), False),
  ):
    assert buckets.refuses(error) == expected, error
    outer = UserError("The file is damaged.")
    outer.__cause__ = error
    assert buckets.refuses(outer) == expected, error


def test_a_download_that_fails_is_no_bucket_unless_a_client_of_buckets_made_it():
  requests, retry = pytest.importorskip("requests"), pytest.importorskip("gcsfs.retry")

  def raised(function, *args):
    with pytest.raises(requests.exceptions.RequestException) as caught:
      function(*args)
    return caught.value

  host = "HTTPSConnectionPool(host='{}', port=443): Max retries exceeded"
  own = raised(requests.get, "http://localhost:1/weights")
  assert buckets.failure(own) == ""
  assert buckets.failure(requests.ConnectionError(host.format("huggingface.co"))) == ""
  google = requests.ConnectionError(host.format("storage.googleapis.com"))
  for error in (google, raised(retry.validate_response, 502, b"", "b/bucket/o")):
    assert buckets.failure(error).startswith("a GCS bucket did not answer, or answered with errors")


FILES_BELOW = """
from etils import epath
from cm3leon_jax.checkpoints import sealing
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


# Program that fails with an error caused by an error of gcsfs.
COMMAND = """
import gcsfs.retry, pathlib
from cm3leon_jax.commands import common
from cm3leon_jax.config import UserError
def main(workdir):
  try:
    raise gcsfs.retry.HttpError({"code": STATUS, "message": "status STATUS"})
  except Exception as error:
    raise KIND("it is damaged") from error
common.run(main, config=False)
"""


GONE = "did not answer, or answered with errors, until the last try", "the same command continues."
REFUSED = (
  "may not be read or written by this account",
  "grant it the permission, or use another account.",
)


@pytest.mark.parametrize(
  ("kind", "status", "exit_code", "sentence"),
  [
    ("UserError", 503, TryAgain.exit_code, GONE),
    ("OSError", 401, UserError.exit_code, REFUSED),
    pytest.param("OSError", 503, TryAgain.exit_code, GONE, marks=pytest.mark.slow),
  ],
)
def test_a_command_ends_with_one_sentence_and_is_started_again_if_that_may_help(
  server, kind, status, exit_code, sentence
):
  pytest.importorskip("gcsfs")
  code = COMMAND.replace("KIND", kind).replace("STATUS", str(status))
  job = run(server, f"sys.argv.append('--workdir=gs://bucket/run')\n{code}")
  _, errors = job.communicate(timeout=300)
  assert job.returncode == exit_code
  what, remedy = sentence
  reason = f"a GCS bucket {what} (HttpError: status {status}, {status})"
  assert errors == f"error: gs://bucket: {reason}: {remedy}\n"


@pytest.mark.slow
def test_a_stage_whose_bucket_is_gone_ends_with_one_sentence(server):
  """Takes half a minute, because gcsfs tries a request 6 times."""
  server.fault = lambda method, path: 503
  code = "from cm3leon_jax.commands import prepare_data as stage\nstage.common.run(stage.main)"
  flags = ["--config=scenes", "--workdir=gs://bucket/run", "--config.raw.source=gs://bucket/in"]
  job = run(server, f"sys.argv += {flags}\n{code}")
  _, errors = job.communicate(timeout=300)
  assert job.returncode == TryAgain.exit_code
  assert errors.startswith("error: gs://bucket: a GCS bucket did not answer, or answered with ")
  assert errors.count("\n") == 1


def test_s3_is_refused_by_name():
  for path in ("s3://bucket/run", "S3a://bucket", "s3n://b/c"):
    with refused(UserError):
      buckets.check_path(path, "config.raw.source")
    with refused(UserError):
      atomic.open_filesystem(path)
  for path in ("gs://s3/run", "runs/s3", "s3:/run", "ray://s3"):
    buckets.check_path(path)

"""Requests to a bucket that never answer, in processes of their own: variables are read once."""

import contextlib
import os
import pathlib
import subprocess
import sys
import threading

import pytest

from tests import bucket_server

ROOT = pathlib.Path(__file__).parents[1]
BEGIN = """
import sys, time
from cm3leon_jax import buckets
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
  return subprocess.Popen(
    [sys.executable, "-c", BEGIN + code],
    env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    | server.environment(),
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def test_an_array_whose_request_is_not_answered_is_asked_for_again(server):
  """As long as the connection lives, TensorStore would wait without the time-out."""
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


def test_a_file_whose_request_is_not_answered_is_asked_for_again(server):
  """And a file that another process writes is seen, although its folder was listed before."""
  pytest.importorskip("gcsfs")  # Of the extra [data].
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

import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request

from etils import epath
import pytest

from tests.generation.run import save_run
from tests.launched import ROOT, SLOW, launch
from tests.refusals import check_refused


@pytest.mark.parametrize(
  ("given", "environment"),
  [
    (["--workdir=nowhere"], {}),
    (["--workdir=scenes"], {"CM3LEON_TOKEN": "short"}),
    (["--workdir=scenes", "--slots=0"], {}),
    (["--workdir=scenes", "--port=abc"], {}),
    (["--workdir=scenes", "--request_seconds=soon"], {}),
    (["--workdir=scenes", "--weight_dtype=fp4"], {}),
    (["--workdir=scenes", "--guidance=2"], {}),
    (["--workdir=scenes", "--config=scenes"], {}),
  ],
)
def test_wrong_flags_are_refused_in_one_sentence(given, environment):
  check_refused(launch("serve", *given, imported=SLOW, **environment))


def test_a_missing_package_is_named():
  check_refused(launch("serve", "--workdir=scenes", missing=["uvicorn"]))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  root = epath.Path(tmp_path_factory.mktemp("tiny"))
  save_run(root)
  return root


def test_a_port_that_is_taken_is_named(run):
  with socket.create_server(("127.0.0.1", 0)) as taken:
    port = taken.getsockname()[1]
    flags = f"--workdir={run}", "--host=0.0.0.0", f"--port={port}"
    result = launch("serve", *flags, imported=SLOW)
  assert result.returncode == 2, result.stderr
  assert f"error: --host=0.0.0.0 --port={port} cannot be opened (Address already in use)" in (
    result.stderr
  )
  warning = "warning: anyone who can reach --host=0.0.0.0 may use this server: set CM3LEON_TOKEN"
  assert warning in result.stderr


@contextlib.contextmanager
def started(run, tmp_path):
  environment = {**os.environ, "PYTHONPATH": str(ROOT), "CM3LEON_TOKEN": "correct-horse"}
  environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=1"
  for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
    del environment[name]
  with open(tmp_path / "stderr", "w") as errors:
    process = subprocess.Popen(
      [sys.executable, "-m", "launch.serve", f"--workdir={run}", "--port=0", "--chunk=1",
       f"--cache_dir={tmp_path / 'caches'}"],
      cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True,
    )  # fmt: skip
    try:
      line, name = process.stdout.readline(), pathlib.Path(run).name
      assert line.startswith(f"serving {name} at http://127.0.0.1:"), (
        tmp_path / "stderr"
      ).read_text()
      yield process, line.split()[-1]
    finally:
      process.kill()
      process.communicate()


def ask(url: str, **body):
  headers = {"Content-Type": "application/json", "Authorization": "Bearer correct-horse"}
  data = json.dumps({"prompt": "a red apple", "n": 8, "stream": True, **body}).encode()
  request = urllib.request.Request(f"{url}v1/images/generations", data, headers)
  return urllib.request.urlopen(request, timeout=120)


def kept(folder) -> set[str]:
  return {path.name for path in (folder / "caches").rglob("*-cache")}


@pytest.mark.slow
def test_it_keeps_programs_logs_requests_and_lets_them_end_at_sigterm(run, tmp_path):
  with started(run, tmp_path) as (process, url):
    requests_end_at_sigterm(process, url)
  log = (tmp_path / "stderr").read_text()
  assert '"POST /v1/images/generations HTTP/1.1" 200' in log
  assert "apple" not in log
  programs = kept(tmp_path)
  # The server compiles programs for running batches at the start, and the others at their first
  # use.
  names = {re.sub(r"-[0-9a-f]{64}-cache$", "", name) for name in programs}
  assert {"jit_steps", "jit_admit", "jit_empty"} <= names, names
  with started(run, tmp_path):
    # Nothing was compiled again: a new program would have a new name.
    assert kept(tmp_path) == programs


def requests_end_at_sigterm(process, url):
  with pytest.raises(urllib.error.HTTPError, match="401"):
    urllib.request.urlopen(f"{url}v1/models", timeout=60)
  with ask(url) as answer:
    first = answer.readline()
    assert first == b"event: image_generation.partial_image\n"
    process.send_signal(signal.SIGTERM)
    refused = threading.Event()

    def knock():
      while not refused.is_set():
        try:
          socket.create_connection(("127.0.0.1", int(url.split(":")[2][:-1])), timeout=5).close()
        except OSError:
          refused.set()

    thread = threading.Thread(target=knock)
    thread.start()
    text = answer.read().decode()
    thread.join(60)
  assert text.count("event: image_generation.completed") == 8
  assert process.wait(60) == 0
  assert process.stdout.read() == "stopped.\n"
  assert refused.is_set()

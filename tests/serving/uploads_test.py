"""Tests of the processes that decode uploads."""

import asyncio
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from cm3leon_jax.data.raw import reader
from cm3leon_jax.serving.errors import ApiError
from cm3leon_jax.serving.web.decoders import Decoders
from tests.data.raw.image_parts_test import SLOW
from tests.refusals import check_sentence
from tests.serving.live import image, png

IMAGE = png(image(0, (12, 8)))
LIMITS = {"resolution": 8, "most_pixels": 64 * 64, "param": "image"}


def with_decoders(test):
  """Turns a coroutine function into a test."""

  def called():
    async def closed():
      decoders = Decoders()
      await test(decoders)
      await decoders.close()

    asyncio.run(closed())

  return called


async def stopped(decoders):
  """Returns the process that waits for an image. It is stopped, so it answers no more."""
  pixels = await decoders.decode(IMAGE, **LIMITS)
  np.testing.assert_array_equal(pixels, reader.load_image(IMAGE, 8))
  [process] = decoders._idle
  os.kill(process.pid, signal.SIGSTOP)
  return process


@with_decoders
async def test_the_process_of_a_request_that_is_over_is_killed_and_replaced(decoders):
  process = await stopped(decoders)
  with pytest.raises(TimeoutError):
    async with asyncio.timeout(0.2):
      await decoders.decode(IMAGE, **LIMITS)
  assert process.returncode == -signal.SIGKILL
  assert (await stopped(decoders)).pid != process.pid


@with_decoders
async def test_a_process_that_ends_fails_only_its_request(decoders):
  process = await stopped(decoders)
  asyncio.get_running_loop().call_later(0.2, process.kill)
  with pytest.raises(ApiError, match="image cannot be decoded") as error:
    await decoders.decode(IMAGE, **LIMITS)
  assert error.value.status == 400
  process = await stopped(decoders)
  process.kill()
  await process.wait()
  await stopped(decoders)


@with_decoders
async def test_a_refused_image_keeps_its_process(decoders):
  scans = SLOW["more than 100 scans"][0]
  for data, why in ((scans, "more than"), (IMAGE[:-30], "is damaged"), (b"", "cannot be read")):
    with pytest.raises(ApiError, match=f"image .*{why}") as error:
      await decoders.decode(data, **LIMITS)
    assert (error.value.status, error.value.param) == (400, "image")
  [process] = decoders._idle
  assert (await stopped(decoders)).pid == process.pid


WRITES = """
import os, sys, warnings
from cm3leon_jax.serving import uploads
def decode(*args, **settings):
  os.write(2, b"of a C library")
  warnings.warn("of Python")
  raise ValueError("of our own")
uploads.decode = decode
uploads.main()
"""


def test_decoders_write_nothing_into_the_log_of_a_server():
  """Regression: 60,000 EXIF tags, a file of 0.7 MB, wrote 11.7 MB of warnings."""
  program = [sys.executable, "-c", WRITES]
  with subprocess.Popen(program, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
    process.stdin.write(json.dumps({"size": 1}).encode() + b"\nx")
    process.stdin.flush()
    log = process.stderr.read().decode()
  check_sentence(log, "ValueError: of our own")
  assert "C library" not in log
  assert "Warning" not in log


SLEEPS = """
import sys, time
from cm3leon_jax.serving import uploads
assert not {"jax", "starlette", "pydantic"} & set(sys.modules)
uploads.decode = lambda *args, **settings: (print("begun", flush=True), time.sleep(60))
uploads.main()
"""


def test_a_process_ends_with_its_server_while_it_decodes_and_not_before():
  program = [sys.executable, "-c", SLEEPS]
  with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
    process.stdin.write(json.dumps({"size": 1}).encode() + b"\nx")
    process.stdin.flush()
    assert process.stdout.readline() == b"begun\n"
    process.terminate()
    with pytest.raises(subprocess.TimeoutExpired):
      process.wait(0.2)
    process.stdin.close()
    assert process.wait(5) == 0

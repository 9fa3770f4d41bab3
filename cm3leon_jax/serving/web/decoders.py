"""Decodes uploads in a few processes, and kills a process when the request it works for is over."""

import asyncio
from asyncio import subprocess
import contextlib
import json
import os
import signal
import sys
from typing import Any

import numpy as np

from cm3leon_jax.serving import uploads
from cm3leon_jax.serving.errors import ApiError, refusal

COUNT = 2  # Processes, which decode one image each.


class Decoders:
  """Processes that run `serving.uploads`. A process starts when it is first needed."""

  def __init__(self) -> None:
    self._free = asyncio.Semaphore(COUNT)
    self._idle: list[subprocess.Process] = []

  async def decode(self, image: bytes, **arguments: Any) -> np.ndarray:
    """Calls `uploads.decode` in a process, which is killed if this call is cancelled."""
    async with self._free:
      self._idle = [process for process in self._idle if process.returncode is None]
      process = self._idle.pop() if self._idle else await _started()
      try:
        answer, pixels = await ask(process, image, arguments)
      except BaseException as error:
        await _end(process)
        if isinstance(error, OSError | EOFError | ValueError):
          param = arguments["param"]
          raise refusal(f"{param} cannot be decoded: send another image.", param) from error
        raise
      self._idle.append(process)
    if "message" in answer:
      raise ApiError(**answer)
    side = arguments["resolution"]
    return np.frombuffer(pixels, np.uint8).reshape(side, side, 3)

  async def close(self) -> None:
    """Ends the processes that wait for an image."""
    while self._idle:
      await _end(self._idle.pop())


async def ask(
  process: subprocess.Process, image: bytes, arguments: dict[str, Any]
) -> tuple[dict[str, Any], bytes]:
  """Sends a request to `uploads.main`. Returns both parts of the answer."""
  assert process.stdin is not None
  assert process.stdout is not None
  line = json.dumps({**arguments, "size": len(image)})
  process.stdin.writelines([line.encode() + b"\n", image])
  await process.stdin.drain()
  answer = json.loads(await process.stdout.readline())
  size = 0 if "message" in answer else 3 * arguments["resolution"] ** 2
  return answer, await process.stdout.readexactly(size)


async def _started() -> subprocess.Process:
  # In a session of its own, Ctrl-C in a terminal does not reach the process.
  program, pipe = (sys.executable, "-m", uploads.__name__), subprocess.PIPE
  return await asyncio.create_subprocess_exec(
    *program, stdin=pipe, stdout=pipe, start_new_session=True
  )


async def _end(process: subprocess.Process) -> None:
  if process.returncode is None:
    # `process.kill` may take the exit status of an ended process from asyncio, which then warns.
    with contextlib.suppress(ProcessLookupError):
      os.kill(process.pid, signal.SIGKILL)
  await process.wait()

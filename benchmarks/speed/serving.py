"""Measures `cm3leon serve` under load: images/s, latencies, memory, and disconnected clients.

  OMP_WAIT_POLICY=passive python -m benchmarks.speed.serving --workdir=scenes-instruct

Starts the server as a user does, and sends requests over HTTP in three ways:
- `full`: all clients request images without a pause. The server alternates with
  `CM3Leon.generate` in this process, which generates images for the same prompts in batches of
  --slots. `generate` also retrieves documents and computes CLIP scores, like the server. Prints the
  ratio of the two rates in wall-clock time and in processor time, which depends less on other work
  on the machine.
- `mixed`: clients request images, event streams, edits, infills, captions and answers with Poisson
  arrivals, first from this server and then from one that decodes one sample at a time (--slots=1).
  --rates=1,2,4,8,16 gives the arrivals per second. Prints the time until the first event of a
  stream, and the time between two events: a chunk, if a row has at most --chunk codes.
- `killed`: clients disconnect in the middle of an event stream.

Server and `generate` share the machine: on a GPU, set XLA_PYTHON_CLIENT_PREALLOCATE=false.
"""

import asyncio
import base64
from collections.abc import Iterable, Iterator, Sequence
import contextlib
import dataclasses
import io
import json
import logging
import os
import random
import re
import subprocess
import sys
import time

from absl import app, flags
import httpx
import numpy as np
from PIL import Image

from cm3leon_jax import CM3Leon

COLORS = ("red", "green", "blue", "yellow")
OBJECTS = ("bell", "key", "star", "heart", "anchor")
KINDS = ("image", "stream", "edit", "infill", "caption", "answer")


def prompt(i: int) -> str:
  return f"a {COLORS[i % 4]} {OBJECTS[i % 5]} to the left of a {COLORS[i // 4 % 4]} key"


def seconds_of(pid: int) -> np.ndarray:
  """Returns the wall-clock time and the processor time of a process in seconds."""
  with open(f"/proc/{pid}/stat") as file:
    fields = file.read().rpartition(")")[2].split()
  ticks = int(fields[11]) + int(fields[12])  # utime, stime.
  return np.array([time.perf_counter(), ticks / os.sysconf("SC_CLK_TCK")])


def offline(model: CM3Leon, numbers: Iterable[int]) -> np.ndarray:
  """Generates images with `CM3Leon.generate`; returns wall-clock and processor time in seconds."""
  start = seconds_of(os.getpid())
  model.generate([prompt(i) for i in numbers])
  return seconds_of(os.getpid()) - start


@contextlib.contextmanager
def server(slots: int) -> Iterator[tuple[int, str]]:
  """Starts a server and waits for its programs; yields its process id and address."""
  command = [sys.executable, "-m", "cm3leon_jax", "serve", "--port=0", f"--slots={slots}"]
  command += [f"--workdir={flags.FLAGS.workdir}", f"--chunk={flags.FLAGS.chunk}"]
  command += ["--most_waiting=256", "--request_seconds=600"]
  process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
  try:
    line = process.stdout.readline()
    if not line.startswith("serving"):
      raise RuntimeError(f"the server printed {line!r}")
    url = line.split()[-1]
    while "cm3leon_serve_warm 0" in httpx.get(f"{url}metrics").text:
      time.sleep(1)
    yield process.pid, url
  finally:
    process.terminate()
    process.wait()


def resident_mib(pid: int) -> int:
  with open(f"/proc/{pid}/statm") as file:
    return round(int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20)


@dataclasses.dataclass(frozen=True)
class Given:
  """Image that is sent with requests: a PNG file of `side` x `side` pixels."""

  png: bytes
  side: int


def given_image(image: Image.Image) -> Given:
  buffer = io.BytesIO()
  image.save(buffer, "PNG")
  return Given(buffer.getvalue(), image.width)


async def event_seconds(client: httpx.AsyncClient, i: int) -> list[float]:
  """Requests an event stream. Returns the time of each event in seconds."""
  began, seconds = time.perf_counter(), []
  body = {"prompt": prompt(i), "seed": i, "stream": True}
  async with client.stream("POST", "v1/images/generations", json=body) as answer:
    answer.raise_for_status()
    async for line in answer.aiter_lines():
      if line == "event: error":
        raise RuntimeError("a stream ended with an error")
      if line.startswith("event: "):
        seconds.append(time.perf_counter() - began)
  return seconds


async def ask(client: httpx.AsyncClient, kind: str, i: int, image: Given) -> None:
  """Sends a request of a kind and reads the response; raises an error if the request fails."""
  png, side = image.png, image.side
  url, files = "v1/images/generations", {"image": ("a.png", png, "image/png")}
  if kind == "image":
    answer = await client.post(url, json={"prompt": prompt(i), "seed": i})
  elif kind in ("edit", "infill"):
    fields = {"prompt": "make the bell red", "seed": str(i)}
    if kind == "infill":
      fields |= {"box": f"{side // 2},0,{side},{side // 2}", "prompt": ""}
    answer = await client.post("v1/images/edits", data=fields, files=files)
  else:
    url = {"url": f"data:image/png;base64,{base64.b64encode(png).decode()}"}
    content = [{"type": "image_url", "image_url": url}]
    if kind == "answer":
      content.append({"type": "text", "text": "What color is the bell?"})
    body = {"messages": [{"role": "user", "content": content}], "seed": i}
    answer = await client.post("v1/chat/completions", json=body)
  answer.raise_for_status()


async def full(url: str, pid: int, numbers: Sequence[int], image: Given, clients: int):
  """Lets all clients request images without a pause between requests.

  Returns:
    The wall-clock time and the processor time of the server in seconds, and a list of errors.
  """
  errors, remaining = [], iter(numbers)
  limits = httpx.Limits(max_connections=None)  # The clients keep their connections.
  async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:

    async def one() -> None:
      for i in remaining:
        try:
          await ask(client, "image", i, image)
        except Exception as error:
          errors.append(repr(error))

    start = seconds_of(pid)
    await asyncio.gather(*(one() for _ in range(clients)))
    return seconds_of(pid) - start, errors


def in_turns(model: CM3Leon, url: str, pid: int, each: int, turns: int, clients: int) -> dict:
  """Compares the server with `generate`; both alternate, with `each` images per turn."""
  image = given_image(model.generate(prompt(0))[0].image)
  offline(model, range(each))  # The first call compiles.
  seconds, errors, memory = [], [], [resident_mib(pid)]
  for turn in range(turns):
    numbers = range(turn * each, (turn + 1) * each)
    alone = offline(model, numbers)
    served, failed = asyncio.run(full(url, pid, numbers, image, clients))
    seconds.append((alone, served))
    errors += failed
    memory.append(resident_mib(pid))
  seconds = np.array(seconds)
  ratios = seconds[:, 0] / seconds[:, 1]
  results = {"errors": len(errors), "first_errors": errors[:3], "resident_mib": memory}
  for i, clock in enumerate(("wall", "processor")):
    rates = each / seconds[:, :, i].T
    results[clock] = {
      name: [round(float(x), 3) for x in (np.median(values), values.min(), values.max())]
      for name, values in (
        ("offline_images_per_second", rates[0]),
        ("server_images_per_second", rates[1]),
        ("ratio", ratios[:, i]),
      )
    }
  return results


async def mixed(url: str, rate: float, count: int, image: Given) -> dict:
  """Sends requests of all kinds with Poisson arrivals."""
  errors, seconds, streams, chance = [], [], [], random.Random(0)
  limits = httpx.Limits(max_connections=None)
  async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:

    async def one(i: int) -> None:
      began = time.perf_counter()
      try:
        kind = KINDS[i % len(KINDS)]
        if kind == "stream":
          streams.append(await event_seconds(client, i))
        else:
          await ask(client, kind, i, image)
        seconds.append(time.perf_counter() - began)
      except Exception as error:
        errors.append(repr(error))

    for i in range(len(KINDS)):  # Compiles all programs first.
      await one(i)
    seconds.clear()
    streams.clear()
    tasks = []
    for i in range(count):
      tasks.append(asyncio.create_task(one(i)))
      await asyncio.sleep(chance.expovariate(rate))
    await asyncio.gather(*tasks)
  p50, p95 = np.percentile(seconds, [50, 95]) if seconds else (None, None)
  return {
    "requests_per_second": rate, "p50_seconds": p50, "p95_seconds": p95,
    "first_event_p50_seconds": np.median([times[0] for times in streams]),
    "between_events_p50_seconds": np.median(np.concatenate([np.diff(times) for times in streams])),
    "errors": len(errors), "first_errors": errors[:3],
  }  # fmt: skip


async def killed(url: str, count: int) -> dict:
  """Disconnects clients during an event stream; returns the work that is left 3 s later."""
  async with httpx.AsyncClient(base_url=url, timeout=600) as client:

    async def leave(i: int) -> int:
      body = {"prompt": prompt(i), "n": 4, "stream": True}
      async with client.stream("POST", "v1/images/generations", json=body) as answer:
        async for _ in answer.aiter_bytes():
          break
        return answer.status_code

    statuses = await asyncio.gather(*(leave(i) for i in range(count)))
    await asyncio.sleep(3)
    text = (await client.get("metrics")).text
  found = dict(re.findall(r"^cm3leon_serve_(requests_active|samples_running) (\S+)", text, re.M))
  return {
    "streams_begun": statuses.count(200),
    **{name: float(value) for name, value in found.items()},
  }


def main(_) -> None:
  logging.getLogger("httpx").setLevel(logging.WARNING)
  model = CM3Leon.load(flags.FLAGS.workdir, batch_size=flags.FLAGS.slots)
  image = given_image(model.generate(prompt(0))[0].image)
  results = {}
  with server(flags.FLAGS.slots) as (pid, url):
    each = max(flags.FLAGS.requests // flags.FLAGS.turns, 1)
    results["full"] = in_turns(model, url, pid, each, flags.FLAGS.turns, flags.FLAGS.clients)
    usual = flags.FLAGS.load * results["full"]["wall"]["server_images_per_second"][0]
    rates = [float(rate) for rate in flags.FLAGS.rates] or [usual]
    results["mixed"] = [asyncio.run(mixed(url, x, flags.FLAGS.mixed, image)) for x in rates]
    results["killed"] = asyncio.run(killed(url, flags.FLAGS.killed))
    results["killed"]["resident_mib"] = resident_mib(pid)
  with server(1) as (_, url):
    alone = [asyncio.run(mixed(url, x, flags.FLAGS.mixed, image)) for x in rates]
    results["mixed, one at a time"] = alone
  print(json.dumps(results, indent=2, default=float))


if __name__ == "__main__":
  flags.DEFINE_string("workdir", "scenes-instruct", "Run or bundle.")
  flags.DEFINE_integer("slots", 8, "Slots per shape.", lower_bound=1)
  flags.DEFINE_integer("chunk", 16, "Steps per chunk.", lower_bound=1)
  flags.DEFINE_integer("clients", 64, "Parallel clients.", lower_bound=1)
  flags.DEFINE_integer("requests", 1000, "Requests of `full`.", lower_bound=1)
  flags.DEFINE_integer("turns", 5, "Turns of `full` and `generate`.", lower_bound=1)
  flags.DEFINE_integer("mixed", 200, "Requests of `mixed`.", lower_bound=1)
  flags.DEFINE_float("load", 0.7, "Arrival rate of `mixed`, relative to the images/s of `full`.")
  flags.DEFINE_list("rates", [], "Arrival rates of `mixed`, per second, instead of --load.")
  flags.DEFINE_integer("killed", 100, "Clients that disconnect.", lower_bound=0)
  app.run(main)

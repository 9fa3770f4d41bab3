"""Measures launch.serve under load: images/s, latencies, memory, clients that are killed.

  python -m benchmarks.serving --workdir=scenes-instruct --requests=1000

Starts the server as a user does, and asks it over HTTP. `offline` is `CM3Leon.generate` in batches
of --slots, in this process, before the server starts. `full`: all clients ask for images without a
pause. `mixed`: images, streams, edits, infills, captions and answers, of Poisson arrivals, once by
the server and once by a server that takes one request at a time (--slots=1). `killed`: clients that
leave in the middle of a stream.
"""

import asyncio
import base64
import contextlib
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

_WORKDIR = flags.DEFINE_string("workdir", "scenes-instruct", "Run or bundle.")
_SLOTS = flags.DEFINE_integer("slots", 8, "Samples of one shape at once.", lower_bound=1)
_CHUNK = flags.DEFINE_integer("chunk", 8, "Tokens between two answers.", lower_bound=1)
_CLIENTS = flags.DEFINE_integer("clients", 64, "Clients at once.", lower_bound=1)
_REQUESTS = flags.DEFINE_integer("requests", 1000, "Requests of `full`.", lower_bound=1)
_MIXED = flags.DEFINE_integer("mixed", 200, "Requests of `mixed`.", lower_bound=1)
_LOAD = flags.DEFINE_float("load", 0.7, "Arrivals of `mixed`, as a share of images/s of `full`.")
_KILLED = flags.DEFINE_integer("killed", 100, "Clients that leave.", lower_bound=0)

COLORS = ("red", "green", "blue", "yellow")
OBJECTS = ("bell", "key", "star", "heart", "anchor")
KINDS = ("image", "stream", "edit", "infill", "caption", "answer")


def prompt(i: int) -> str:
  return f"a {COLORS[i % 4]} {OBJECTS[i % 5]} to the left of a {COLORS[i // 4 % 4]} key"


def offline() -> tuple[float, bytes]:
  """Returns images/s of the Python API in batches of --slots, and an image as a PNG file."""
  from cm3leon_jax import CM3Leon

  model, count = CM3Leon.load(_WORKDIR.value, batch_size=_SLOTS.value), 8 * _SLOTS.value
  prompts = [prompt(i) for i in range(count)]
  model.generate(prompts)
  rates = []
  for _ in range(3):
    began = time.perf_counter()
    samples = model.generate(prompts)
    rates.append(count / (time.perf_counter() - began))
  buffer = io.BytesIO()
  samples[0][0].image.save(buffer, "PNG")
  return float(np.median(rates)), buffer.getvalue()


@contextlib.contextmanager
def server(slots: int):
  """Starts a server; yields its process and its address."""
  command = [sys.executable, "-m", "cm3leon_jax", "serve", "--port=0", f"--slots={slots}"]
  command += [f"--workdir={_WORKDIR.value}", f"--chunk={_CHUNK.value}", "--queue=256"]
  command += ["--request_seconds=600"]
  process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
  try:
    line = process.stdout.readline()
    if not line.startswith("serving"):
      raise RuntimeError(f"the server printed {line!r}")
    yield process, line.split()[-1]
  finally:
    process.terminate()
    process.wait()


def resident_mib(process: subprocess.Popen) -> float:
  with open(f"/proc/{process.pid}/statm") as file:
    return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


async def ask(client: httpx.AsyncClient, kind: str, i: int, png: bytes) -> None:
  """Sends a request of a kind and reads its answer. Raises an error if it is refused."""
  url, files = "v1/images/generations", {"image": ("a.png", png, "image/png")}
  if kind in ("image", "stream"):
    body = {"prompt": prompt(i), "seed": i, "stream": kind == "stream"}
    answer = await client.post(url, json=body)
  elif kind in ("edit", "infill"):
    fields = {"prompt": "make the bell red", "seed": str(i)}
    fields |= {"box": "24,0,48,24", "prompt": ""} if kind == "infill" else {}
    answer = await client.post("v1/images/edits", data=fields, files=files)
  else:
    image = {"url": f"data:image/png;base64,{base64.b64encode(png).decode()}"}
    content = [{"type": "image_url", "image_url": image}]
    if kind == "answer":
      content.append({"type": "text", "text": "What color is the bell?"})
    body = {"messages": [{"role": "user", "content": content}], "seed": i}
    answer = await client.post("v1/chat/completions", json=body)
  answer.raise_for_status()
  if kind == "stream" and "event: error" in answer.text:
    raise RuntimeError(answer.text[-200:])


async def full(url: str, process: subprocess.Popen, png: bytes) -> dict:
  """All clients ask for images without a pause."""
  errors, memory, todo = [], [], iter(range(_REQUESTS.value))
  async with httpx.AsyncClient(base_url=url, timeout=600) as client:

    async def one() -> None:
      for i in todo:
        try:
          await ask(client, "image", i, png)
        except Exception as error:
          errors.append(repr(error))
        if i % max(_REQUESTS.value // 10, 1) == 0:
          memory.append(round(resident_mib(process)))

    began = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(_CLIENTS.value)))
    rate = _REQUESTS.value / (time.perf_counter() - began)
  return {"images_per_second": rate, "errors": errors[:3], "resident_mib": memory}


async def mixed(url: str, rate: float, png: bytes) -> dict:
  """Requests of all kinds, of Poisson arrivals."""
  errors, seconds, draw = [], [], random.Random(0)
  async with httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits()) as client:

    async def one(i: int) -> None:
      began = time.perf_counter()
      try:
        await ask(client, KINDS[i % len(KINDS)], i, png)
        seconds.append(time.perf_counter() - began)
      except Exception as error:
        errors.append(repr(error))

    for i in range(len(KINDS)):  # Shapes that are not compiled yet.
      await one(i)
    seconds.clear()
    tasks = []
    for i in range(_MIXED.value):
      tasks.append(asyncio.create_task(one(i)))
      await asyncio.sleep(draw.expovariate(rate))
    await asyncio.gather(*tasks)
  p50, p95 = np.percentile(seconds, [50, 95])
  return {"p50_seconds": p50, "p95_seconds": p95, "errors": errors[:3]}


async def killed(url: str) -> dict:
  """Clients leave after the first event of a stream; returns what the server still holds."""
  async with httpx.AsyncClient(base_url=url, timeout=600) as client:

    async def leave(i: int) -> None:
      body = {"prompt": prompt(i), "n": 4, "stream": True}
      async with client.stream("POST", "v1/images/generations", json=body) as answer:
        async for _ in answer.aiter_bytes():
          break

    await asyncio.gather(*(leave(i) for i in range(_KILLED.value)))
    await asyncio.sleep(3)
    text = (await client.get("metrics")).text
  found = dict(re.findall(r"^cm3leon_serve_(requests_active|samples_running) (\S+)", text, re.M))
  return {name: float(value) for name, value in found.items()}


def main(_) -> None:
  logging.getLogger("httpx").setLevel(logging.WARNING)
  rate, png = offline()
  results = {"offline": {"images_per_second": rate}}
  with server(_SLOTS.value) as (process, url):
    results["full"] = asyncio.run(full(url, process, png))
    arrivals = _LOAD.value * results["full"]["images_per_second"]
    results["mixed"] = asyncio.run(mixed(url, arrivals, png))
    results["killed"] = asyncio.run(killed(url))
    results["killed"]["resident_mib"] = round(resident_mib(process))
  with server(1) as (_, url):
    results["mixed, one at a time"] = asyncio.run(mixed(url, arrivals, png))
  results["full"]["of_offline"] = results["full"]["images_per_second"] / rate
  print(json.dumps(results, indent=2, default=float))


if __name__ == "__main__":
  app.run(main)

"""Counts samples that change, despite the same seed, when other samples are decoded with them.

  python -m benchmarks.same_seed --tokens=20000

Generates samples of every task with a bundled model, from flat distributions (no top-k or top-p,
temperature 1.5). Each sample is generated alone, in a batch, in a running batch that admits samples
at any time, and in both kinds of batches on 8 (fake) devices. The token ids of a sample should
always be the same. But matrix products of different shapes round differently, which changes logits
by 1e-6 in float32 and by 1e-2 in bfloat16. Prints a row for each task and kind of batch. With
--dtype=float32, the exit code is 1 if a token differs.
"""

from collections.abc import Callable, Sequence
import dataclasses
import itertools
import os
import sys

# JAX reads this variable when it is imported.
if "--xla" not in os.environ.get("XLA_FLAGS", ""):
  os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

from absl import app, flags
import jax
import numpy as np

from cm3leon_jax import CM3Leon
from cm3leon_jax.config import UserError
from cm3leon_jax.decoding.continuous.engine import ContinuousGenerator
from cm3leon_jax.decoding.request import Request
from cm3leon_jax.generation.image_tasks import Edit, InfillImage, TextToImage
from cm3leon_jax.generation.tasks import Task
from cm3leon_jax.generation.text_tasks import Caption, InfillText, Interleaved, Question
from cm3leon_jax.scenes import source
from cm3leon_jax.scenes.config import RARE

FLAT = {
  "temperature": 1.5, "top_k": 0, "top_p": 1.0,
  "text_temperature": 1.5, "text_top_k": 0, "text_top_p": 1.0,
}  # fmt: skip
LENGTH = 24  # Number of tokens of a text.


def tasks_of(model: CM3Leon) -> dict[str, Callable[[int], Task]]:
  """Returns kind of task -> function that creates the i-th task of this kind."""
  settings = model.pipeline.settings
  sampling = dataclasses.replace(settings.sampling, **FLAT)
  config = dataclasses.replace(settings.scenes, heldout=700)
  pairs = [source.pair(config, "heldout", i) for i in range(64)]
  drawn = source.ScenesSource(config)
  images = [drawn.load(pair.image, source.SIDE) for pair in pairs]
  names = sorted(RARE)

  def of(kind, **fields):
    return lambda i: kind(
      seed=i, row=i, sampling=sampling, **{k: v(i % len(pairs)) for k, v in fields.items()}
    )

  def image(i):
    return images[i]

  def caption(i):
    return pairs[i].caption

  return {
    "image": of(TextToImage, prompt=caption, retrieve=lambda i: 0),
    "image, 1 document": of(
      TextToImage, prompt=lambda i: f"a green {names[i]} at the top left", retrieve=lambda i: 1
    ),
    "infilled image": of(InfillImage, image=image, box=lambda i: (0, 0, 24, 24 * (1 + i % 2))),
    "edit": of(Edit, image=image, prompt=lambda i: "Mirror the image"),
    "caption": of(Caption, image=image, length=lambda i: LENGTH),
    "answer": of(Question, image=image, prompt=lambda i: "How many bells are there?"),
    "infilled text": of(
      InfillText, prompt=lambda i: "a <mask> at the top left", length=lambda i: LENGTH
    ),
    "document": of(Interleaved, prompt=caption, length=lambda i: 4 * LENGTH),
  }


def requests_of(model: CM3Leon, tasks: Sequence[Task]) -> list[Request]:
  pipeline = model.pipeline
  with jax.set_mesh(model.mesh):
    given = pipeline.check(tasks)
    return pipeline.requests(tasks, given, pipeline.retrieve(tasks))


def batches(model: CM3Leon, requests, sampling, size: int) -> list[np.ndarray]:
  """Generates samples in batches of `size`; returns the token ids of each sample."""
  found = []
  with jax.set_mesh(model.mesh):
    for start in range(0, len(requests), size):
      some = requests[start : start + size]
      results = model.pipeline.generator.generate(
        some, range(start, start + len(some)), sampling=sampling
      )
      found += [result.tokens for result in results]
  return found


def running_batches(model: CM3Leon, requests, sampling, slots: int) -> list[np.ndarray]:
  """Generates in a running batch; alternately fills one free slot and all free slots."""
  found: dict[int, np.ndarray] = {}
  with jax.set_mesh(model.mesh):
    engine = ContinuousGenerator(model.pipeline.generator, slots=slots, chunk=5)
    waiting, places, turn = iter(enumerate(requests)), {}, itertools.count()
    following = next(waiting, None)
    while following is not None or engine.active:
      most = slots if next(turn) % 2 else 1  # Staggers the samples.
      while following is not None and most and engine.can_admit(following[1], sampling):
        i, request = following
        places[engine.admit(request, i, sampling)] = i
        following, most = next(waiting, None), most - 1
      for update in engine.step():
        if update.finished:
          found[places[update.ticket]] = update.result.tokens
          engine.remove(update.ticket)
  return [found[i] for i in range(len(requests))]


def compare(expected: list[np.ndarray], found: list[np.ndarray]) -> tuple[int, int]:
  """Returns the number of differing samples and the number of compared tokens.

  Tokens after the first difference are not compared, because the samples have different prefixes.
  """
  differing = tokens = 0
  for a, b in zip(expected, found, strict=True):
    size = max(len(a), len(b))
    a, b = (np.pad(x, (0, size - len(x)), constant_values=-1) for x in (a, b))
    places = np.flatnonzero(a != b)
    differing += bool(len(places))
    tokens += int(places[0]) + 1 if len(places) else size
  return differing, tokens


def measure(
  one: CM3Leon, eight: CM3Leon, make: Callable[[int], Task], tokens: int, size: int
) -> dict:
  """Returns kind of batch -> (differing samples, compared tokens, samples), for a kind of task.

  Args:
    one: the model on 1 device.
    eight: the same model on 8 devices.
    make: creates the i-th task.
    tokens: minimum number of tokens that are compared.
    size: samples per batch, and slots of a running batch.
  """
  alone: list[np.ndarray] = []
  requests: list[Request] = []
  sampling = make(0).sampling
  while sum(map(len, alone)) < tokens:
    start = len(alone)
    requests += requests_of(one, [make(i) for i in range(start, start + 64)])
    for i in range(start, len(requests)):
      with jax.set_mesh(one.mesh):
        [result] = one.pipeline.generator.generate([requests[i]], [i], sampling=sampling)
      alone.append(result.tokens)
  ways = {
    "in a batch": batches(one, requests, sampling, size),
    "in a running batch": running_batches(one, requests, sampling, size),
    "8 devices, in a batch": batches(eight, requests, sampling, size),
    "8 devices, in a running batch": running_batches(eight, requests, sampling, size),
  }
  return {way: (*compare(alone, found), len(alone)) for way, found in ways.items()}


def main(argv):
  if len(argv) > 1:
    raise UserError(f"unexpected argument '{argv[1]}': this command takes flags only.")
  given = flags.FLAGS
  options = {"dtype": given.dtype, "batch_size": given.batch}
  devices = jax.devices()
  if len(devices) < 8 or given.batch % 8:
    raise UserError(
      f"there are {len(devices)} devices, and --batch is {given.batch}; at least 8 devices and a "
      "multiple of 8 are required."
    )
  one, eight = (CM3Leon.load(given.model, devices=devices[:n], **options) for n in (1, 8))
  makers, total = tasks_of(one), 0
  if unknown := {*given.tasks} - {*makers}:
    raise UserError(f"--tasks names '{min(unknown)}'; it must name some of {', '.join(makers)}.")
  print("| task | way | samples that differ | tokens compared |\n|---|---|---|---|", flush=True)
  for name, make in makers.items():
    if name in (given.tasks or makers):
      found = measure(one, eight, make, given.tokens, given.batch)
      for way, (differing, tokens, samples) in found.items():
        total += differing
        print(f"| {name} | {way} | {differing} of {samples} | {tokens:,} |", flush=True)
  if given.dtype == "float32" and total:
    sys.exit(1)


if __name__ == "__main__":
  flags.DEFINE_string("model", "scenes-instruct", "Bundled model, or its folder.")
  flags.DEFINE_integer("tokens", 20_000, "Minimum number of tokens per task and way.", 1)
  flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Dtype of the computation.")
  flags.DEFINE_list("tasks", [], "Names of tasks; default: all.")
  flags.DEFINE_integer("batch", 16, "Samples per batch, and slots of a running batch.", 2)
  app.run(main)

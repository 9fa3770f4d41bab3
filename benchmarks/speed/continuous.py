"""Compares the speed of continuous batching and of batches that start together, on a bundled model.

  OMP_WAIT_POLICY=passive python -m benchmarks.speed.continuous

Generates images with the model `scenes`, 8 at a time, without and with retrieved documents. Runs of
the two methods alternate. In the column "together", continuous batching refills all slots at once,
so all samples start together. In "staggered", it ends a sample and admits the next one every few
steps.
"""

from collections.abc import Callable
import itertools
import time

from absl import app, flags
import jax
import numpy as np

from cm3leon_jax import CM3Leon
from cm3leon_jax.decoding.continuous.engine import ContinuousGenerator
from cm3leon_jax.decoding.request import Request
from cm3leon_jax.generation.image_tasks import TextToImage
from examples.scenes.options import RARE

_MODEL = flags.DEFINE_string("model", "scenes", "Name of a bundled model, or folder of a run.")
_SLOTS = flags.DEFINE_integer("slots", 8, "Number of slots.", lower_bound=1)
_CHUNK = flags.DEFINE_integer("chunk", 16, "Steps per chunk.", lower_bound=1)
_IMAGES = flags.DEFINE_integer("images", 48, "Images per timed run.", lower_bound=1)
_RUNS = flags.DEFINE_integer("runs", 7, "Timed runs of each variant, after a run that compiles.", 1)
_RETRIEVE = flags.DEFINE_list("retrieve", ["0", "2"], "Numbers of retrieved documents to compare.")


def requests_of(model: CM3Leon, count: int, retrieve: int) -> list[Request]:
  """Returns requests for images of rare objects, which images in the bank show."""
  names = sorted(RARE)
  tasks = [TextToImage(f"a green {names[i % len(names)]}", retrieve=retrieve) for i in range(count)]
  pipeline = model.pipeline
  with jax.set_mesh(model.mesh):
    return pipeline.requests(tasks, {}, pipeline.retrieve(tasks))


def clocks() -> np.ndarray:
  """Returns the wall-clock time and the processor time of this process in seconds."""
  return np.array([time.perf_counter(), time.process_time()])


def run_batch(
  engine: ContinuousGenerator,
  requests: list[Request],
  apart: bool,
  finished: Callable[[int, np.ndarray], None],
) -> np.ndarray:
  """Generates one image per request, while an endless queue keeps the slots full.

  Args:
    engine: generator without requests; it has none after the call, too.
    requests: requests; the seed of each is its index in the list.
    apart: whether to fill one slot per chunk before the measurement, so that samples end at
      different times.
    finished: called with the index of a request and its tokens.

  Returns:
    Seconds that `len(requests)` images take on both clocks, see `clocks`.
  """
  numbers, places, count = itertools.count(), {}, 0

  def add():
    i = next(numbers) % len(requests)
    places[engine.admit(requests[i], i)] = i

  def can_admit() -> bool:
    # If the next request must wait for a free slot, all later requests must wait, too.
    return engine.can_admit(requests[len(places) % len(requests)])

  for _ in range(engine.slots if apart else 0):
    add()
    engine.step()
  start = clocks()
  while count < len(requests):
    while can_admit():
      add()
    for update in engine.step():
      if update.finished:
        count += 1
        finished(places[update.ticket], update.result.tokens)
  seconds = (clocks() - start) * len(requests) / count
  for ticket in places:
    engine.remove(ticket)
  return seconds


def measure(model: CM3Leon, requests: list[Request]) -> str:
  """Measures all methods and returns a row of the table."""
  generator, count = model.pipeline.generator, len(requests)
  tokens = model.pipeline.settings.vqgan.image_tokens + 1
  together = ContinuousGenerator(generator, _SLOTS.value, _CHUNK.value)
  # A chunk this long ends one sample, and then the next request is admitted.
  staggered = ContinuousGenerator(generator, _SLOTS.value, max(1, tokens // _SLOTS.value))
  seconds, others = [], []
  for _ in range(_RUNS.value + 1):
    start = clocks()
    with jax.set_mesh(model.mesh):
      expected = [x.tokens for x in generator.generate(requests, range(count))]
    seconds.append([clocks() - start])

    def finished(i, tokens, expected=expected):
      others.append(not np.array_equal(tokens, expected[i]))

    for engine in (together, staggered):
      seconds[-1].append(run_batch(engine, requests, engine is staggered, finished))
  seconds = np.array(seconds[1:])  # The first run compiles, so omit its time.
  cells = []
  for i, wall in enumerate(seconds[:, :, 0].T):
    rates, ratios = count / wall, np.median(seconds[:, 0] / seconds[:, i], axis=0)
    cells.append(f"{np.median(rates):.1f} ({rates.min():.1f} to {rates.max():.1f})")
    if i:
      cells.append(f"{ratios[0]:.2f}, {ratios[1]:.2f}")
  longest = max(len(s) for r in requests for s in r.streams)
  return f"| {longest} | {' | '.join(cells)} | {sum(others)} of {len(others)} |"


def main(_) -> None:
  model = CM3Leon.load(_MODEL.value, batch_size=_SLOTS.value)
  print("Images/s of `generate` and of a batch whose queue is never empty: median (range).")
  print("Ratios to the alternating run of `generate`: medians in wall-clock, processor time.")
  print("| documents | prompt | `generate` | together | ratio | staggered | ratio | differ |")
  print("|---|---|---|---|---|---|---|---|")
  for retrieve in map(int, _RETRIEVE.value):
    row = measure(model, requests_of(model, _IMAGES.value, retrieve))
    print(f"| {retrieve} {row}", flush=True)


if __name__ == "__main__":
  app.run(main)

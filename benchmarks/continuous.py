"""Measures continuous batching against batches that start together, on a bundled model, in turns.

  OMP_WAIT_POLICY=passive python -m benchmarks.continuous

Images of `scenes`, without and with retrieved documents, 8 at once. In step: all rows of the lane
are refilled at once, as in a batch. Out of step: a sample ends and the next joins every few steps.
"""

import time

from absl import app, flags
import jax
import numpy as np

from cm3leon_jax import CM3Leon
from cm3leon_jax.data import scene_world
from cm3leon_jax.decoding.continuous import ContinuousGenerator
from cm3leon_jax.decoding.request import Request
from cm3leon_jax.generation.image_tasks import TextToImage

_MODEL = flags.DEFINE_string("model", "scenes", "Bundled model, or folder of a run.")
_SLOTS = flags.DEFINE_integer("slots", 8, "Samples at once.", lower_bound=1)
_CHUNK = flags.DEFINE_integer("chunk", 16, "Steps of a chunk.", lower_bound=1)
_IMAGES = flags.DEFINE_integer("images", 48, "Images of a timed run.", lower_bound=1)
_RUNS = flags.DEFINE_integer("runs", 7, "Timed runs of each, after one that compiles.", 1)
_RETRIEVE = flags.DEFINE_list("retrieve", ["0", "2"], "Numbers of retrieved documents.")


def requests_of(model: CM3Leon, count: int, retrieve: int) -> list[Request]:
  """Returns requests of rare objects, which the bank has."""
  names = sorted(scene_world.RARE)
  tasks = [TextToImage(f"a green {names[i % len(names)]}", retrieve=retrieve) for i in range(count)]
  pipeline = model.pipeline
  with jax.set_mesh(model.mesh):
    return pipeline.requests(tasks, {}, pipeline.retrieve(tasks))


def run_lane(engine: ContinuousGenerator, requests: list[Request], apart: bool) -> list[np.ndarray]:
  """Generates for a full queue; `apart`: rows are filled one at a time at first."""
  waiting, images, places = list(enumerate(requests)), {}, {}
  joined = 0
  while waiting or engine.busy:
    while waiting and engine.has_room(waiting[0][1]):
      i, request = waiting.pop(0)
      places[engine.add(request, i)] = i
      joined += 1
      if apart and joined < engine.slots:
        break
    for update in engine.step():
      if update.over:
        images[places[update.ticket]] = update.tokens
  return [images[i] for i in range(len(requests))]


def ways_of(model: CM3Leon, requests: list[Request]) -> dict:
  """Returns functions that generate the tokens of all requests."""
  generator = model.pipeline.generator
  engine = ContinuousGenerator(generator, _SLOTS.value, _CHUNK.value)

  def offline():
    with jax.set_mesh(model.mesh):
      return [x.tokens for x in generator.generate(requests, range(len(requests)))]

  return {
    "offline": offline,
    "in step": lambda: run_lane(engine, requests, apart=False),
    "out of step": lambda: run_lane(engine, requests, apart=True),
  }


def main(_) -> None:
  model, count = CM3Leon.load(_MODEL.value, batch_size=_SLOTS.value), _IMAGES.value
  print("| documents | prompt tokens | offline images/s | in step | out of step |")
  print("|---|---|---|---|---|")
  for retrieve in map(int, _RETRIEVE.value):
    requests = requests_of(model, count, retrieve)
    ways = ways_of(model, requests)
    made, rates = {name: run() for name, run in ways.items()}, {name: [] for name in ways}
    for name in ways:
      same = sum(map(np.array_equal, made["offline"], made[name]))
      if same < count:
        print(f"{name}: {same} of {count} images are those of offline.")
    for _ in range(_RUNS.value):
      for name, run in ways.items():
        start = time.perf_counter()
        run()
        rates[name].append(count / (time.perf_counter() - start))
    longest, base = max(len(s) for r in requests for s in r.streams), np.array(rates["offline"])
    cells = [f"{np.median(base):.1f} ({base.min():.1f} to {base.max():.1f})"]
    for name in list(ways)[1:]:
      ratio = np.median(np.array(rates[name]) / base)
      cells.append(f"{np.median(rates[name]):.1f}, {ratio:.2f} of offline")
    print(f"| {retrieve} | {longest} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
  app.run(main)

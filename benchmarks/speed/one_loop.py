"""Measures whether continuous batching could replace the decoding loop of `Generator`.

  OMP_WAIT_POLICY=passive python -m benchmarks.speed.one_loop

Continuous batching admits all requests of a batch and steps until all are finished. `generate`
processes a common prefix of the prompts only once, and its caches grow as needed. The two methods
alternate. Parameters are random, so all tokens are nearly equally likely, and rounding changes some
tokens of long samples.
"""

import time

from absl import app, flags
import jax
import numpy as np

from cm3leon_jax.config.model import ModelConfig
from cm3leon_jax.decoding.continuous.engine import ContinuousGenerator
from cm3leon_jax.decoding.generator import Generator, GeneratorConfig
from cm3leon_jax.decoding.request import text_to_image
from cm3leon_jax.mesh import MeshConfig, create_mesh
from cm3leon_jax.models import transformer
from cm3leon_jax.vocab import VocabLayout

_RUNS = flags.DEFINE_integer("runs", 7, "Timed runs of each way, after a run that compiles.", 1)
_CASES = flags.DEFINE_list("cases", None, "Indices of the cases (default: all).")
_WIDTH = flags.DEFINE_integer("width", 128, "Width of the decoder.", 32)

SAMPLES = 8
VOCAB = VocabLayout(text_size=512, image_size=1_024)
# Name -> (tokens per caption, whether all captions are the same, codes per image, batch size).
CASES = {
  "8 short captions, 64 codes": (16, False, 64, SAMPLES),
  "8 samples of a short caption, 64 codes": (16, True, 64, SAMPLES),
  "8 samples of a prompt of 512 tokens, 64 codes": (512, True, 64, SAMPLES),
  "8 prompts of 512 tokens, 64 codes": (512, False, 64, SAMPLES),
  "8 short captions, 1,024 codes": (16, False, 1_024, SAMPLES),
  "1 sample of a short caption, 64 codes": (16, True, 64, 1),
}


def requests_of(tokens: int, equal: bool, codes: int, samples: int):
  """Returns requests for images with captions of `tokens` random tokens."""
  rng = np.random.default_rng(0)
  captions = [rng.integers(VOCAB.num_special, VOCAB.text_size, tokens) for _ in range(samples)]
  return [text_to_image(VOCAB, codes, captions[0 if equal else i]) for i in range(samples)]


def clocks() -> np.ndarray:
  """Returns the wall-clock time and the processor time of this process in seconds."""
  return np.array([time.perf_counter(), time.process_time()])


def in_engine(engine: ContinuousGenerator, requests) -> list[np.ndarray]:
  """Admits all requests, and steps until all are finished."""
  numbers = {engine.admit(request, seed): seed for seed, request in enumerate(requests)}
  tokens = {}
  while engine.active:
    for update in engine.step():
      if update.finished:
        tokens[numbers[update.ticket]] = update.result.tokens
  return [tokens[i] for i in range(len(requests))]


def measure(tokens: int, equal: bool, codes: int, samples: int) -> str:
  """Measures a case of CASES; returns the cells of its table row, joined."""
  width, positions = _WIDTH.value, tokens + codes + 8
  model = ModelConfig(
    family="modern", vocab_size=VOCAB.size, num_layers=4, width=width, num_heads=width // 64,
    mlp_width=3 * width, max_positions=positions,
  )  # fmt: skip
  with jax.set_mesh(create_mesh(MeshConfig())):
    params = transformer.init_params(model, jax.random.key(0))
    config = GeneratorConfig(model, VOCAB, codes, positions, batch_size=samples)
    generator = Generator(params, config)
  engine = ContinuousGenerator(generator, samples, chunk=64)
  requests, seconds, differ = requests_of(tokens, equal, codes, samples), [], 0
  for _ in range(_RUNS.value + 1):
    start = clocks()
    with jax.set_mesh(engine.mesh):
      expected = [x.tokens for x in generator.generate(requests, range(samples))]
    middle = clocks()
    found = in_engine(engine, requests)
    seconds.append((middle - start, clocks() - middle))
    differ += sum(not np.array_equal(*pair) for pair in zip(expected, found))
  own, others = np.moveaxis(np.array(seconds[1:]), 1, 0)  # The first run compiles.
  ratios = others / own
  cells = [f"{np.median(x[:, 0]):.3f} s" for x in (own, others)]
  for of_clock in ratios.T:
    cells.append(f"{np.median(of_clock):.2f} ({of_clock.min():.2f} to {of_clock.max():.2f})")
  return " | ".join([*cells, str(differ)])


def main(_) -> None:
  print(
    "Medians of seconds. Ratios to `generate` in the same turn: median (range) in wall-clock and in"
  )
  print("processor time. The last column counts samples whose tokens differ.")
  print("| batch | `generate` | admit all, step until done | ratio | processor ratio | differ |")
  print("|---|---|---|---|---|---|")
  names = list(CASES)
  for i in map(int, _CASES.value or range(len(names))):
    print(f"| {names[i]} | {measure(*CASES[names[i]])} |", flush=True)


if __name__ == "__main__":
  app.run(main)

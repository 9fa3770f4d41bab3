"""Measures how bf16 and int8 change a run's decoding: loss in bits, log-probabilities, speed.

  python -m benchmarks.decode_precision --config=ml_configs/scenes.py --workdir=workdir/scenes

The decoder reads held-out captions and their images through its cache, which gives the held-out
loss in bits per code. Then it generates images for the same captions, which gives the speed. All
numbers are for image codes only.
"""

# R rows, L length, V vocabulary.

import dataclasses
import functools
import time

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from cm3leon_jax.checkpoints import reading
from cm3leon_jax.commands import common
from cm3leon_jax.data.documents.store import DocumentStore
from cm3leon_jax.decoding import cache as cache_lib
from cm3leon_jax.decoding import loop, request
from cm3leon_jax.decoding import params as params_lib
from cm3leon_jax.decoding.generator import Generator, GeneratorConfig
from cm3leon_jax.mesh import shard
from cm3leon_jax.positions import positions_of

_DOCUMENTS = flags.DEFINE_integer("documents", 64, "Held-out documents to score.", lower_bound=2)
_IMAGES = flags.DEFINE_integer("images", 16, "Batch size of the speed measurement.", lower_bound=1)
_RUNS = flags.DEFINE_integer("runs", 3, "Timed runs, after a run that compiles.", lower_bound=1)

# (compute dtype, weight dtype, cache dtype).
VARIANTS = [
  ("float32", "compute", "compute"),
  ("float32", "int8", "compute"),
  ("float32", "compute", "int8"),
  ("float32", "int8", "int8"),
  ("bfloat16", "compute", "compute"),
  ("bfloat16", "int8", "int8"),
]
ROWS = 16


@functools.partial(jax.jit, static_argnames=("config", "cache_dtype"))
def score(params: params_lib.DecodeParams, tokens, positions, *, config, cache_dtype):
  """Scores ids [R, L] at positions [R, L] through a cache. Rows are padded on the right.

  Returns:
    fp32 log-probabilities [R, L, V] of the next id at each position; the first ids are image codes.
  """
  rows, length = tokens.shape
  tokens = shard(tokens, "batch", None)
  mask = shard(
    jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (rows, 1, length, length)),
    "batch",
    None,
    None,
    None,
  )
  positions = shard(positions, "batch", None)
  layers = cache_lib.empty(config, rows, length, cache_dtype)
  hidden = loop.extend(
    config,
    params.model,
    tokens,
    positions,
    lambda i, q, k, v: layers[i].write(0, k, v).attend(q, mask),
  )
  logits = jnp.einsum("RLD,DV->RLV", hidden, params.head, preferred_element_type=jnp.float32)
  return jax.nn.log_softmax(logits, axis=-1)


def code_log_probs(
  params, config, cache_dtype: str, samples, vocab
) -> tuple[np.ndarray, np.ndarray]:
  """Returns, for each image code, its log-probability [codes], and that of every id [codes, V]."""
  length, right, every = max(map(len, samples)), [], []
  for start in range(0, len(samples), ROWS):
    part = samples[start : start + ROWS]
    tokens = np.full((ROWS, length), vocab.pad, np.int32)
    positions = np.zeros_like(tokens)
    for row, sample in enumerate(part):
      tokens[row, : len(sample)] = sample
      positions[row, : len(sample)] = positions_of(sample, vocab, config.align_images)
    scores = np.asarray(score(params, tokens, positions, config=config, cache_dtype=cache_dtype))
    for row in range(len(part)):
      places = np.flatnonzero(vocab.is_image(tokens[row])) - 1
      every.append(scores[row, places])
      right.append(scores[row, places, vocab.image_codes(tokens[row, places + 1])])
  return np.concatenate(right), np.concatenate(every)


def main(settings, workdir) -> None:
  vocab, image_tokens = settings.vocab, settings.vqgan.image_tokens
  store = DocumentStore(workdir / "documents" / "heldout_pairs", vocab)
  chosen = [
    store[i] for i in np.linspace(0, len(store) - 1, min(_DOCUMENTS.value, len(store))).astype(int)
  ]
  requests = [request.text_to_image(vocab, image_tokens, d.segments[0].tokens) for d in chosen]
  samples = [np.concatenate([r.streams[0], d.segments[1].tokens]) for r, d in zip(requests, chosen)]
  print(
    "| compute | weights | cache | bits a code | change "
    "| mean, largest change of a log-probability | codes/s |"
  )
  print("|---|---|---|---|---|---|---|")
  with common.use_mesh(settings):
    params, _ = reading.load_params(workdir / "train", settings.model)
    base = None
    for dtype, weight_dtype, cache_dtype in VARIANTS:
      config = dataclasses.replace(settings.model, dtype=dtype)
      prepared = params_lib.prepare(params, config=config, vocab=vocab, dtype=weight_dtype)
      right, every = code_log_probs(prepared, config, cache_dtype, samples, vocab)
      base = (right, every) if base is None else base
      # Compare only ids whose probability is above 0.1% in the first variant.
      change = np.abs(every - base[1])[base[1] > np.log(1e-3)]
      options = {
        "weight_dtype": weight_dtype,
        "cache_dtype": cache_dtype,
        "batch_size": _IMAGES.value,
      }
      generator = Generator(
        params, GeneratorConfig.of(dataclasses.replace(settings, model=config), **options)
      )
      rates = []
      for seed in range(_RUNS.value + 1):
        start = time.perf_counter()
        some = requests[: _IMAGES.value]
        results = generator.generate(some, [seed] * len(some))
        rates.append(len(results) * image_tokens / (time.perf_counter() - start))
      bits, before = -right.mean() / np.log(2), -base[0].mean() / np.log(2)
      changes = f"{bits:.4f} | {bits - before:+.4f} | {change.mean():.4f}, {change.max():.3f}"
      speed = f"{np.median(rates[1:]):.0f} ({min(rates[1:]):.0f} to {max(rates[1:]):.0f})"
      print(f"| {dtype} | {weight_dtype} | {cache_dtype} | {changes} | {speed} |", flush=True)


if __name__ == "__main__":
  common.run(main)

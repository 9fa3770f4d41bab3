"""What bf16 and int8 cost and gain in decoding: held-out bits, logits and speed, on a finished run.

  python -m benchmarks.decode_precision --config=ml_configs/openmoji.py --workdir=workdir/openmoji

Held-out captions and their pictures are read through the decoder's own cache, token by token as it was taught; then pictures
are drawn for the same captions. All figures are of image codes.
"""

# R rows, L length, V vocabulary.

import dataclasses
import functools
import time

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from cm3leon_jax.commands import common
from cm3leon_jax.data.documents import DocumentStore
from cm3leon_jax.decoding import cache as cache_lib
from cm3leon_jax.decoding import loop, request
from cm3leon_jax.decoding import params as params_lib
from cm3leon_jax.decoding.generator import Generator, GeneratorConfig
from cm3leon_jax.mesh import shard
from cm3leon_jax.training import checkpoint

_DOCUMENTS = flags.DEFINE_integer(
  "documents", 64, "Held-out documents that are scored.", lower_bound=2
)
_DRAWN = flags.DEFINE_integer(
  "drawn", 16, "Pictures that are drawn at once, for the speed.", lower_bound=1
)
_RUNS = flags.DEFINE_integer(
  "runs", 3, "Runs that are timed, after one that is not.", lower_bound=1
)

# Compute dtype, weights, cache.
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
def score(made: params_lib.DecodeParams, tokens, *, config, cache_dtype):
  """[R, L] ids, padded at the right -> [R, L, V] fp32 log-probabilities of what follows each, codes first, through a cache."""
  rows, length = tokens.shape
  tokens = shard(tokens, "batch", None)
  mask = shard(
    jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (rows, 1, length, length)),
    "batch",
    None,
    None,
    None,
  )
  positions = shard(jnp.broadcast_to(jnp.arange(length), (rows, length)), "batch", None)
  layers = cache_lib.empty(config, rows, length, cache_dtype)
  hidden = loop.extend(
    config,
    made.model,
    tokens,
    positions,
    lambda i, q, k, v: layers[i].write(0, k, v).attend(q, mask),
  )
  logits = jnp.einsum("RLD,DV->RLV", hidden, made.head, preferred_element_type=jnp.float32)
  return jax.nn.log_softmax(logits, axis=-1)


def code_log_probs(made, config, cache_dtype: str, samples, vocab) -> tuple[np.ndarray, np.ndarray]:
  """([codes] log-probability of each image code of the samples, [codes, V] of every id in its place)."""
  length, right, every = max(map(len, samples)), [], []
  for start in range(0, len(samples), ROWS):
    part = samples[start : start + ROWS]
    tokens = np.full((ROWS, length), vocab.pad, np.int32)
    for row, sample in enumerate(part):
      tokens[row, : len(sample)] = sample
    found = np.asarray(score(made, tokens, config=config, cache_dtype=cache_dtype))
    for row in range(len(part)):
      places = np.flatnonzero(vocab.is_image(tokens[row])) - 1
      every.append(found[row, places])
      right.append(found[row, places, vocab.image_codes(tokens[row, places + 1])])
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
    "| compute | weights | cache | bits a code | change | mean and largest change of a log-probability | codes/s |"
  )
  print("|---|---|---|---|---|---|---|")
  with common.use_mesh(settings):
    params, _ = checkpoint.load_params(workdir / "train", settings.model)
    base = None
    for dtype, weight_dtype, cache_dtype in VARIANTS:
      config = dataclasses.replace(settings.model, dtype=dtype)
      made = params_lib.prepare(params, config=config, vocab=vocab, dtype=weight_dtype)
      right, every = code_log_probs(made, config, cache_dtype, samples, vocab)
      base = (right, every) if base is None else base
      # Of what is not hopeless anyway.
      change = np.abs(every - base[1])[base[1] > np.log(1e-3)]
      options = {
        "weight_dtype": weight_dtype,
        "cache_dtype": cache_dtype,
        "batch_size": _DRAWN.value,
      }
      generator = Generator(
        params, GeneratorConfig.of(dataclasses.replace(settings, model=config), **options)
      )
      rates = []
      for seed in range(_RUNS.value + 1):
        start = time.perf_counter()
        drawn = generator.generate(
          requests[: _DRAWN.value], [seed] * min(_DRAWN.value, len(requests))
        )
        rates.append(len(drawn) * image_tokens / (time.perf_counter() - start))
      bits, before = -right.mean() / np.log(2), -base[0].mean() / np.log(2)
      told = f"{bits:.4f} | {bits - before:+.4f} | {change.mean():.4f}, {change.max():.3f}"
      speed = f"{np.median(rates[1:]):.0f} ({min(rates[1:]):.0f} to {max(rates[1:]):.0f})"
      print(f"| {dtype} | {weight_dtype} | {cache_dtype} | {told} | {speed} |", flush=True)


if __name__ == "__main__":
  common.run(main)

"""Compares the speed of guided decoding with other libraries and with the memory bandwidth.

  OMP_WAIT_POLICY=passive python -m benchmarks.speed.decode
  python -m benchmarks.speed.decode --peers=false --weight_dtype=int8

The other libraries (peers) are torch and transformers, which need the extra [dev]. Runs of the
decoders alternate. Settings: 4 prompts of 32 tokens (3 tokens in the unconditional stream), 256 new
tokens, guidance 3, top-k 256, top-p 0.9, fp32. The bandwidth floor of a step is the time of a plain
read of the weights and of the filled part of the cache.
"""

import functools
import tempfile
import time

from absl import app, flags
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.speed import decode_model
from benchmarks.speed.train_step import measured_peak
from cm3leon_jax.decoding import loop
from cm3leon_jax.decoding import params as params_lib
from cm3leon_jax.decoding import request as request_lib
from cm3leon_jax.decoding.cache import DTYPES as CACHE_DTYPES
from cm3leon_jax.decoding.generator import Generator, GeneratorConfig
from cm3leon_jax.export import huggingface
from cm3leon_jax.mesh import MeshConfig, create_mesh
from cm3leon_jax.vocab import VocabLayout

_RUNS = flags.DEFINE_integer("runs", 5, "Timed runs, after a run that compiles.", lower_bound=1)
_PEERS = flags.DEFINE_bool("peers", True, "Also time torch and transformers.")
_WEIGHT_DTYPE = flags.DEFINE_enum(
  "weight_dtype", "compute", params_lib.DTYPES, "Dtype of this project's weights."
)
_CACHE_DTYPE = flags.DEFINE_enum(
  "cache_dtype", "compute", CACHE_DTYPES, "Dtype of this project's cache."
)

VOCAB, MODEL, NEW_TOKENS = VocabLayout(), decode_model.MODEL, decode_model.NEW_TOKENS


def ours(params, image_head: bool) -> decode_model.Peer:
  """Returns this project's decoder; for `image_head`, see `GeneratorConfig`."""
  options = {
    "weight_dtype": _WEIGHT_DTYPE.value,
    "cache_dtype": _CACHE_DTYPE.value,
    "image_head": image_head,
  }
  generator = Generator(
    params, GeneratorConfig(MODEL, VOCAB, NEW_TOKENS, MODEL.max_positions, **options)
  )

  def run(prompts, seed):
    requests = [request_lib.text_to_image(VOCAB, NEW_TOKENS, p[1:-1]) for p in prompts]
    results = generator.generate(requests, range(seed, seed + len(prompts)))
    return np.stack([r.codes(VOCAB) for r in results])

  return run


def read_bandwidth(gib: float = 1.0, repeats: int = 9) -> float:
  """Measures the bandwidth of a plain read, in bytes/s: the fastest of `repeats` array sums."""
  array = jnp.ones((int(gib * 2**28),), jnp.float32)
  total, seconds = jax.jit(jnp.sum), []
  for _ in range(repeats):
    start = time.perf_counter()
    total(array).block_until_ready()
    seconds.append(time.perf_counter() - start)
  return array.nbytes / min(seconds[1:])


def step_bytes(params, image_head: bool, prompts) -> float:
  """Computes the bytes that an average step must read: fp32 weights and a half-full cache."""
  block_bytes = sum(x.nbytes for x in jax.tree.leaves(params["blocks"]))
  head_bytes = (VOCAB.image_size if image_head else VOCAB.size) * MODEL.width * 4
  unconditional = len(request_lib.unconditional_prompt(VOCAB))
  cached = sum(len(p) + unconditional + NEW_TOKENS for p in prompts)
  return block_bytes + head_bytes + 2 * MODEL.num_layers * cached * MODEL.width * 4


def prefill_seconds(params, prompts, repeats: int = 9) -> tuple[float, int]:
  """Returns the median time of a prefill on a CPU in seconds, and its number of tokens."""
  made = params_lib.prepare(params, config=MODEL, vocab=VOCAB, transposed=True)
  requests = [request_lib.text_to_image(VOCAB, NEW_TOKENS, p[1:-1]) for p in prompts]
  config, seconds = GeneratorConfig(MODEL, VOCAB, NEW_TOKENS, MODEL.max_positions), []
  batch, static = config.batch(requests, range(len(requests)))
  prefill = jax.jit(functools.partial(loop.prefill, static=static))
  for _ in range(repeats + 1):
    start = time.perf_counter()
    jax.block_until_ready(prefill(made.model, batch.prompts, batch.control.plan))
    seconds.append(time.perf_counter() - start)
  return float(np.median(seconds[1:])), int(batch.prompts.rests[1].sum())


def main(_) -> None:
  params = decode_model.random_params(MODEL)
  prompts = decode_model.random_prompts(VOCAB, decode_model.BATCH, decode_model.PROMPT)
  with (
    jax.set_mesh(create_mesh(MeshConfig(), jax.devices()[:1])),
    tempfile.TemporaryDirectory() as folder,
  ):
    placed = jax.tree.map(jnp.asarray, params)
    names = {"full head": False, "image rows of the head": True}
    peers = {
      f"this project, {name}": ours(placed, image_head) for name, image_head in names.items()
    }
    if _PEERS.value:
      from benchmarks.speed import decode_peers as peers_lib  # Imports torch.

      tensors = peers_lib.opt_arrays(params)
      for product in peers_lib.PRODUCTS:
        peers[f"torch loop, {product}"] = peers_lib.torch_loop(
          tensors, MODEL, VOCAB, NEW_TOKENS, product=product
        )
      huggingface.export(folder, params, MODEL, VOCAB, None)
      peers["transformers generate"] = peers_lib.transformers_generate(folder, VOCAB, NEW_TOKENS)
    bandwidth = read_bandwidth()
    rates_of = decode_model.rates(peers, prompts, _RUNS.value)
    bandwidth = max(bandwidth, read_bandwidth())
    print(
      f"{jax.devices()[0].device_kind}: plain read {bandwidth / 2**30:.1f} GiB/s; "
      f"tokens/s of {_RUNS.value} runs:"
    )
    for name, rates in rates_of.items():
      print(f"  {name:<36} median {np.median(rates):6.1f} ({min(rates):.1f} to {max(rates):.1f})")
    for name, image_head in names.items():
      floor = decode_model.BATCH * bandwidth / step_bytes(params, image_head, prompts)
      rate = np.median(rates_of[f"this project, {name}"])
      print(f"floor, fp32, {name}: {floor:.0f} tokens/s; reached {rate / floor:.0%}")
    seconds, tokens = prefill_seconds(placed, prompts)
    flops = 2 * tokens * sum(x.size for x in jax.tree.leaves(params["blocks"]))
    peak = measured_peak("float32")
    print(
      f"prefill: {seconds * 1e3:.1f} ms, {tokens / seconds:,.0f} tokens/s, "
      f"{flops / seconds / peak:.0%} of the matrix peak"
    )


if __name__ == "__main__":
  app.run(main)

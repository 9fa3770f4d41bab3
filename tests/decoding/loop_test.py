"""Tests that logits from prompts and steps over the cache equal those of plain causal passes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm3leon_jax.decoding import batch, loop
from cm3leon_jax.decoding import cache as cache_lib
from cm3leon_jax.decoding import params as params_lib
from cm3leon_jax.mesh import shard, spec
from tests.decoding.small import VOCAB, full_logits, guided_requests, model_config, on_mesh
from tests.models.tiny import random_params

STEPS = 4


@functools.partial(jax.jit, static_argnames=("config", "cache_dtype"))
def cached_logits(params, prompts, ids, config, cache_dtype="compute"):
  """Returns logits [R, STEPS, V] after each prompt and after each of the ids [R, STEPS - 1]."""
  cache, seen = loop.read_prompts(config, params.model, prompts, cache_dtype)
  rows, filled = prompts.row, prompts.entries
  cache = cache_lib.rows(cache, rows, filled, filled + STEPS)

  def of_rows(x):
    return x.at[rows].get(out_sharding=spec("batch", *[None] * (x.ndim - 1)))

  seen = jnp.pad(of_rows(seen), ((0, 0), (0, STEPS)))
  last, after = (shard(x, "batch") for x in (prompts.last_positions, prompts.next_positions))

  def step(carry, token):
    cache, seen, t = carry
    seen, layers = (
      jax.lax.dynamic_update_slice(seen, jnp.ones_like(seen[:, :1]), (0, filled + t)),
      list(cache),
    )

    def attend(i, q, k, v):
      layers[i] = layers[i].write(filled + t, k, v)
      return layers[i].attend(q, seen[:, None, None])

    positions = jnp.where(t == 0, last, after + t - 1)[:, None]
    hidden = loop.extend(config, params.model, token[:, None], positions, attend)
    return (tuple(layers), seen, t + 1), hidden[:, 0] @ params.head

  tokens = jnp.concatenate([prompts.last[:, None], ids], axis=1)
  return jax.lax.scan(step, (cache, seen, 0), shard(tokens, "batch", None).T)[1].swapaxes(0, 1)


def example(align_images=False):
  """Returns (prompts of different lengths, their arrays, ids that follow each prompt)."""
  requests = guided_requests()
  rows = [request.streams[0] for request in requests]
  read = [batch.prompts_of(request, VOCAB, align_images)[0] for request in requests]
  ids = VOCAB.image_ids(
    np.random.default_rng(0).integers(0, VOCAB.image_size, (len(rows), STEPS - 1))
  )
  return rows, batch.prompt_arrays(read, VOCAB.pad, 1), ids


@pytest.mark.parametrize(
  ("family", "shared", "align_images", "fields"),
  [
    ("opt", False, False, {}),
    ("modern", True, True, {"head_size": 6, "rope_base": 1e6}),
    ("modern", True, False, {"num_kv_heads": 2}),
  ],
)
def test_cached_equals_uncached(family, shared, align_images, fields, monkeypatch):
  if shared:
    monkeypatch.setattr(batch, "SHARED", 2)
    monkeypatch.setattr(batch, "BUCKET", 8)
  config = model_config(family, align_images=align_images, **fields)
  rows, prompts, ids = example(align_images)
  assert (prompts.prefixes is not None) == shared
  with on_mesh():
    params = random_params(config)
    prepared = params_lib.prepare(params, config=config, vocab=VOCAB)
    out = np.asarray(cached_logits(prepared, prompts, ids, config))[
      ..., np.argsort(params_lib.head_ids(VOCAB))
    ]
    for row, prompt in enumerate(rows):
      expected = full_logits(config, params, np.concatenate([prompt, ids[row]]))[len(prompt) - 1 :]
      assert np.abs(expected).max() > 1
      np.testing.assert_allclose(out[row], expected, atol=1e-5, rtol=1e-5)
      # Negative control: rows have different logits.
      assert np.abs(out[row] - out[row - 1]).max() > 0.1

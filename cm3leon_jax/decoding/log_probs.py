"""Computes log-probabilities of the image codes at the end of given samples, in one pass."""

# R rows, P tokens of a padded row, I codes of an image, V vocabulary.

from collections.abc import Sequence
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Float32, Int32
import numpy as np

from cm3leon_jax.decoding import batch, cache
from cm3leon_jax.decoding.generator import Generator, GeneratorConfig
from cm3leon_jax.decoding.loop import extend
from cm3leon_jax.decoding.params import DecodeParams, head_logits, only_codes
from cm3leon_jax.mesh import batch_shards, shard
from cm3leon_jax.positions import positions_of


def of_last_image(
  generator: Generator, samples: Sequence[Int32[np.ndarray, " _"]]
) -> Float32[np.ndarray, "R I"]:
  """Computes the log-probability of each code of the image that ends each of R samples.

  Probabilities are over the image codes, as in sampling, without guidance, and before temperature
  and filters. Needs a current mesh.
  """
  vocab, align = generator.config.vocab, generator.config.model.align_images
  read = [np.stack([s, positions_of(s, vocab, align)], 1).astype(np.int32) for s in samples]
  count = batch.rounded(len(samples), batch_shards())
  rows = batch.pad_left([read[i % len(read)] for i in range(count)], vocab.pad)
  return np.asarray(_of_last(generator.config, generator.params, rows))[: len(samples)]


@functools.partial(jax.jit, static_argnums=0)
def _of_last(
  config: GeneratorConfig, params: DecodeParams, rows: batch.Padded
) -> Float32[jax.Array, "R I"]:
  (ids, valid, positions), count = (shard(x, "batch", None) for x in rows), config.image_tokens
  layers = cache.empty(config.model, *ids.shape)
  mask = valid[:, None, None, :] & jnp.tri(ids.shape[1], dtype=bool)[None, None]

  def attend(i: int, q: cache.Read, k: cache.Read, v: cache.Read) -> cache.Read:
    return layers[i].write(0, k, v).attend(q, mask)

  hidden = extend(config.model, params.model, ids, positions, attend)[:, -count - 1 : -1]
  logits = only_codes(head_logits(hidden, params.head), config.vocab)
  logits = shard(logits, "batch", None, None)
  pick = jax.vmap(jax.vmap(lambda row, i: row[i]))
  targets = ids[:, -count:] - config.vocab.text_size  # Codes are the first columns of the head.
  return jax.sharding.reshard(pick(jax.nn.log_softmax(logits), targets), jax.P())

"""Speculative Jacobi decoding: several codes of an image in a step, from the distribution of one at a time.

Teng et al. 2024, "Accelerating Auto-regressive Text-to-Image Generation with Training-free Speculative Jacobi Decoding".
"""

# B samples, S guidance streams, R = B x S rows, W codes of a window, K image codes, I codes of the image, T cache slots.

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cm3leon_jax.decoding import decode
from cm3leon_jax.decoding import weights as weights_lib
from cm3leon_jax.decoding.decode import Control, Loop, Sampler
from cm3leon_jax.decoding.grammar import Grammar
from cm3leon_jax.decoding.guidance import combine_streams
from cm3leon_jax.decoding.sampling import filter_candidates, select
from cm3leon_jax.decoding.weights import Weights
from cm3leon_jax.mesh import shard, spec
from cm3leon_jax.models.attention import wide


class Window(NamedTuple):
  """What is carried from step to step.

  Attributes:
    loop: its cache is written here, its tokens are the last accepted ones; the rest is as it was before the image.
    done: [B] int32, codes accepted.
    drafts: [B, W - 1] int32, codes in [0, K) that follow if they are accepted.
    odds: [B, W - 1, K] fp32, the distribution that each draft was drawn from.
    codes: [B, I + W] int32; behind `done` they mean nothing.
    log_probs: [B, I + W] fp32, likewise.
    steps: int32 scalar, steps made.
  """

  loop: Loop
  done: jax.Array
  drafts: jax.Array
  odds: jax.Array
  codes: jax.Array
  log_probs: jax.Array
  steps: jax.Array


def verify(keys, drafts, odds, probabilities):
  """Accepts drafts from the left as long as they hold; the token behind them comes from what the odds left out.

  A draft x holds with probability min(1, p(x) / q(x)). The first that does not is replaced by a draw from max(p - q, 0);
  if all hold, one more is drawn from the last p. So each token is one of p (Leviathan et al. 2023).

    p = q: all drafts hold. p(x) = 0: x never does.

  Args:
    keys: [B] PRNG keys.
    drafts: [B, W - 1] int32.
    odds: [B, W - 1, K], q of each draft.
    probabilities: [B, W, K], p of each place, given that all drafts before it hold.

  Returns:
    (how many drafts hold [B] int32 in [0, W), tokens [B, W] int32, of which the first hold + 1 count).
  """

  def one(key, drafts, odds, p):
    accept, replace = jax.random.split(key)
    of = lambda table: jax.vmap(lambda row, i: row[i])(table, drafts)
    holds = jax.random.uniform(accept, drafts.shape) * of(odds) < of(p[:-1])
    count = jnp.cumprod(holds.astype(jnp.int32)).sum()
    left = jnp.maximum(p - jnp.concatenate([odds, jnp.zeros_like(p[-1:])]), 0)[count]
    # By rounding nothing may be left of a draft that failed by a hair.
    left = jnp.where(left.sum() > 0, left, p[count])
    token = jax.random.categorical(replace, jnp.log(left)).astype(drafts.dtype)
    places = jnp.arange(len(p))
    return count, jnp.where(places == count, token, jnp.pad(drafts, (0, 1)))

  return jax.vmap(one)(keys, drafts, odds, probabilities)


def _hidden(config, params, loop: Loop, done, drafts):
  """Reads the last token of each row and the drafts behind it. Returns (hidden [R, W, D], cache)."""
  streams, batch, window = len(loop.seen), len(loop.ids), drafts.shape[1] + 1
  repeat = lambda x: jnp.repeat(
    x, streams, axis=0, total_repeat_length=batch * streams, out_sharding=spec("batch", None)
  )
  tokens = jnp.concatenate([loop.tokens[:, None], repeat(drafts)], axis=1)
  # Drafts behind the image's end are read, and never accepted.
  positions = jnp.minimum(
    loop.lengths[:, None] + jnp.arange(window)[None], config.max_positions - 1
  )
  masks = []
  for s, seen in enumerate(loop.seen):
    slots = jnp.arange(seen.shape[1])[None, None]
    ends = (loop.slots[s] + done)[:, None, None] + jnp.arange(window)[None, :, None]
    masks.append((seen[:, None] | ((slots >= loop.slots[s]) & (slots <= ends)))[:, None])

  layers = [list(layer) for layer in loop.cache]
  write = lambda cache, s, k, v: cache.write_rows(loop.slots[s] + done, k, v)
  attend = decode.over_streams(layers, masks, write)
  hidden = decode.extend(config, params, tokens, positions, attend)
  return hidden, tuple(map(tuple, layers))


def _distributions(weights: Weights, control: Control, hidden, done, codes: int, sampler: Sampler):
  """What each code of the window is drawn from: (probabilities [B, W, K], log-probabilities before temperature and filters)."""
  batch, _, streams = control.guidance.shape
  window, size = hidden.shape[1], weights.image_head.shape[1]
  axis = weights_lib.head_axis(size)
  out = {"preferred_element_type": wide(hidden.dtype), "out_sharding": spec("batch", None, axis)}
  logits = jnp.einsum("BLD,DR->BLR", hidden, weights.image_head, **out)
  logits = jnp.reshape(
    logits, (batch, streams, window, size), out_sharding=spec("batch", None, None, axis)
  )
  logits = jnp.reshape(
    logits.swapaxes(1, 2), (batch * window, streams, size), out_sharding=spec("batch", None, axis)
  )
  places = jnp.minimum(done[:, None] + jnp.arange(window)[None], codes - 1)
  of_streams = jax.vmap(lambda table, rows: table[rows])(control.guidance, places)
  of_streams = jnp.reshape(of_streams, (batch * window, streams), out_sharding=spec("batch", None))
  guided = shard(combine_streams(logits.swapaxes(0, 1), of_streams), "batch", None)
  every = jnp.ones_like(guided[:, 0], bool)
  rows = select(every, ~every, control.values)
  values, ids = filter_candidates(
    guided / rows.temperature[:, None], rows.top_k, rows.top_p, sampler.of_codes
  )
  place = jax.vmap(lambda ids, p: jnp.zeros(size, p.dtype).at[ids].set(p))
  apart = lambda x: jnp.reshape(x, (batch, window, size), out_sharding=spec("batch", None, None))
  return apart(place(ids, jax.nn.softmax(values, axis=-1))), apart(
    jax.nn.log_softmax(guided, axis=-1)
  )


def _first(loop: Loop, keys, codes: int, window: int, size: int, dtype) -> Window:
  """Drafts are anything."""
  zeros = lambda *shape, dtype=jnp.int32: jnp.zeros(
    (len(loop.ids), *shape), dtype, out_sharding=spec("batch", *[None] * len(shape))
  )
  anything = jax.vmap(
    lambda key: jax.random.randint(jax.random.fold_in(key, 2**32 - 1), (window - 1,), 0, size)
  )
  return Window(
    loop=loop,
    done=zeros(),
    drafts=anything(keys),
    odds=zeros(window - 1, size, dtype=wide(dtype)) + 1 / size,
    codes=zeros(codes + window),
    log_probs=zeros(codes + window, dtype=jnp.float32),
    steps=jnp.int32(0),
  )


def _accept(w: Window, cache, p, log_p, keys, codes: int, text_size: int) -> Window:
  """The window behind what holds; p and log_p are of `_distributions`. What the drafts behind it become, this pass says."""
  window, size = p.shape[1:]
  pick = jax.vmap(lambda table, token: table[token])
  cut = lambda x, start: jax.vmap(lambda x, i: jax.lax.dynamic_slice_in_dim(x, i, window - 1))(
    x, start
  )
  put = jax.vmap(lambda into, x, i: jax.lax.dynamic_update_slice_in_dim(into, x, i, 0))
  repeat = lambda x: jnp.repeat(
    x, len(w.loop.seen), total_repeat_length=len(w.loop.tokens), out_sharding=spec("batch")
  )
  now = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, w.steps), 3))(keys)
  holds, tokens = verify(now[:, 0], w.drafts, w.odds, p)
  taken = jnp.minimum(holds + 1, codes - w.done)
  again = jax.vmap(lambda key, p: jax.random.categorical(key, jnp.log(p)))(now[:, 1], p).astype(
    jnp.int32
  )
  anything = jax.vmap(lambda key: jax.random.randint(key, (window,), 0, size))(now[:, 2])
  last = jnp.where(
    repeat(taken > 0), repeat(pick(tokens, jnp.maximum(taken - 1, 0)) + text_size), w.loop.tokens
  )
  return Window(
    loop=w.loop._replace(tokens=last, lengths=w.loop.lengths + repeat(taken), cache=cache),
    done=w.done + taken,
    drafts=cut(jnp.concatenate([again, anything], axis=1), taken),
    odds=cut(jnp.concatenate([p, jnp.full_like(p, 1 / size)], axis=1), taken),
    codes=put(w.codes, tokens, w.done),
    log_probs=put(w.log_probs, jax.vmap(pick)(log_p, tokens).astype(jnp.float32), w.done),
    steps=w.steps + 1,
  )


def _behind(w: Window, plan, grammar: Grammar, codes: int) -> Loop:
  """The loop behind the image: all samples are at the same place again."""
  loop, vocab = w.loop, grammar.vocab
  drawn = jnp.arange(loop.ids.shape[1])[None] < codes
  fit = lambda x, otherwise: jnp.where(drawn, x[:, : loop.ids.shape[1]], otherwise)
  slots = lambda seen: jnp.arange(seen.shape[1])[None]
  mark = lambda seen, start: seen | ((slots(seen) >= start) & (slots(seen) < start + codes))
  state = grammar.next_part(plan, loop.state)
  return loop._replace(
    seen=tuple(mark(seen, loop.slots[s]) for s, seen in enumerate(loop.seen)),
    slots=loop.slots + codes,
    count=loop.count + codes,
    going=jnp.any(grammar.active(plan, state)),
    state=state,
    ids=fit(w.codes + vocab.text_size, vocab.pad),
    log_probs=fit(w.log_probs, 0),
  )


def draw_image(
  weights: Weights,
  control: Control,
  loop: Loop,
  *,
  config,
  grammar: Grammar,
  sampler: Sampler,
  codes: int,
  window: int,
):
  """All codes of an image, for samples whose plans begin with it. Needs a mesh; `loop` is used up.

  Args:
    weights: with an image head.
    control: no row is contrastive.
    loop: of `decode.begin`, with room for codes + window tokens.
    config: of the model.
    grammar: what the plans are written in.
    sampler: as in `decode.advance`.
    codes: I.
    window: W, at least 2: codes that are read in a step.

  Returns:
    (loop behind the image, steps that were made as int32 scalar).
  """
  text_size = grammar.vocab.text_size
  shards = lambda x: shard(x, *["batch"] + [None] * (x.ndim - 1))
  control = Control(*(shards(x) for x in control[:4]), control.values)
  keys = jax.vmap(jax.random.key)(control.seeds)

  def step(w: Window) -> Window:
    hidden, cache = _hidden(config, weights.params, w.loop, w.done, w.drafts + text_size)
    p, log_p = _distributions(weights, control, hidden, w.done, codes, sampler)
    return _accept(w, cache, p, log_p, keys, codes, text_size)

  first = _first(loop, keys, codes, window, weights.image_head.shape[1], config.dtype)
  w = jax.lax.while_loop(lambda w: jnp.any(w.done < codes), step, first)
  return _behind(w, control.plan, grammar, codes), w.steps

"""Implements speculative Jacobi decoding, which generates several image codes per step.

The distribution of images does not change. See Teng et al. 2024, "Accelerating
Auto-regressive Text-to-Image Generation with Training-free Speculative Jacobi Decoding".
"""

# B samples, S guidance streams, R = B x S rows, W codes of a window, D = W - 1 drafts, K different
# image codes, I codes of an image.

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32, Key, Shaped

from cm3leon_jax.decoding.cache import LayerCache, Layers, Read, over_streams
from cm3leon_jax.decoding.control import Control
from cm3leon_jax.decoding.grammar import Grammar, Plan
from cm3leon_jax.decoding.loop import LoopState, Static, extend, split_control, to_rows
from cm3leon_jax.decoding.params import DecodeParams, head_axis
from cm3leon_jax.decoding.sampling.guidance import combine_streams, divergence
from cm3leon_jax.decoding.sampling.rows import Sampler, select
from cm3leon_jax.decoding.sampling.top_p import filter_candidates
from cm3leon_jax.mesh import shard, spec
from cm3leon_jax.models.attention import wide
from cm3leon_jax.models.config import ModelConfig


class Window(NamedTuple):
  """The state of the loop over the codes of an image.

  Attributes:
    loop: the decoding state. Each step changes its cache, its last tokens and their positions. Its
      other fields keep their values from before the image.
    done: number of accepted codes.
    drafts: drafts of the next codes, in [0, K).
    odds: distribution from which each draft was sampled.
    codes, log_probs: codes of the image; only the first `done` entries are valid.
    divergence: sum over the accepted codes; see `LoopState`.
  """

  loop: LoopState
  done: Int32[Array, " B"]
  drafts: Int32[Array, "B D"]
  odds: Float[Array, "B D K"]
  codes: Int32[Array, "B I+W"]
  log_probs: Float32[Array, "B I+W"]
  divergence: Float32[Array, " B"]
  steps: Int32[Array, ""]


def verify(
  keys: Key[Array, " B"],
  drafts: Int32[Array, "B D"],
  odds: Float[Array, "B D K"],
  probabilities: Float[Array, "B D+1 K"],
) -> tuple[Int32[Array, " B"], Int32[Array, "B D+1"]]:
  """Accepts drafts from left to right until a draft is rejected, then samples one more token.

  A draft x is accepted with probability min(1, p(x) / q(x)). The first rejected draft is replaced
  by a sample from max(p - q, 0). If all drafts are accepted, one more token is sampled from the
  last p. So each token has the distribution p (Leviathan et al. 2023).

    p = q: all drafts are accepted. p(x) = 0: draft x is never accepted.

  Args:
    drafts: D = W - 1 codes.
    odds: q of each draft.
    probabilities: p for each code, given all drafts before the code.

  Returns:
    (number n of accepted drafts; tokens, of which the first n + 1 are valid).
  """

  def one(
    key: Key[Array, ""],
    drafts: Int32[Array, " D"],
    odds: Float[Array, "D K"],
    p: Float[Array, "D+1 K"],
  ) -> tuple[Int32[Array, ""], Int32[Array, " D+1"]]:
    accept, replace = jax.random.split(key)
    pick = jax.vmap(lambda row, i: row[i])
    uniform = jax.random.uniform(accept, drafts.shape)
    holds = uniform * pick(odds, drafts) < pick(p[:-1], drafts)
    count = jnp.cumprod(holds.astype(jnp.int32)).sum()
    left = jnp.maximum(p - jnp.concatenate([odds, jnp.zeros_like(p[-1:])]), 0)[count]
    # If p and q are nearly equal, rounding may make max(p - q, 0) zero everywhere.
    left = jnp.where(left.sum() > 0, left, p[count])
    token = jax.random.categorical(replace, jnp.log(left)).astype(drafts.dtype)
    places = jnp.arange(len(p))
    return count, jnp.where(places == count, token, jnp.pad(drafts, (0, 1)))

  return jax.vmap(one)(keys, drafts, odds, probabilities)


def _read_drafts(
  config: ModelConfig,
  model: dict,
  loop: LoopState,
  done: Int32[Array, " B"],
  drafts: Int32[Array, "B D"],
) -> tuple[Float[Array, "R W width"], tuple[Layers, ...]]:
  """Reads the last token of each row and its drafts. Returns (hidden states, cache)."""
  streams, window = len(loop.seen), drafts.shape[1] + 1
  tokens = jnp.concatenate([loop.tokens[:, None], to_rows(drafts, streams)], axis=1)
  after = loop.next_positions[:, None] + jnp.arange(window - 1)[None]
  positions = jnp.concatenate([loop.positions[:, None], after], axis=1)
  # Clip the positions of drafts after the end of the image. Such drafts are never accepted.
  positions = jnp.minimum(positions, config.max_positions - 1)
  masks = []
  for s, seen in enumerate(loop.seen):
    entries = jnp.arange(seen.shape[1])[None, None]
    ends = (loop.next_entries[s] + done)[:, None, None] + jnp.arange(window)[None, :, None]
    masks.append((seen[:, None] | ((entries >= loop.next_entries[s]) & (entries <= ends)))[:, None])

  def write(cache: LayerCache, s: int, k: Read, v: Read) -> LayerCache:
    return cache.write_rows(loop.next_entries[s] + done, k, v)

  layers = [list(layer) for layer in loop.cache]
  attend = over_streams(layers, masks, write)
  hidden = extend(config, model, tokens, positions, attend)
  return hidden, tuple(map(tuple, layers))


def _distributions(
  params: DecodeParams,
  control: Control,
  hidden: Float[Array, "R W width"],
  done: Int32[Array, " B"],
  codes: int,
  sampler: Sampler,
) -> tuple[Float[Array, "B W K"], Float[Array, "B W K"], Float32[Array, "B W"]]:
  """Computes the distributions of the window's codes.

  Returns (probabilities after temperature and filters, log-probabilities before temperature and
  filters, divergence of the streams).
  """
  batch, _, streams = control.guidance.shape
  assert params.image_head is not None
  window, size = hidden.shape[1], params.image_head.shape[1]
  axis = head_axis(size)
  out: dict[str, Any] = {
    "preferred_element_type": wide(hidden.dtype),
    "out_sharding": spec("batch", None, axis),
  }
  logits = jnp.einsum("BLD,DR->BLR", hidden, params.image_head, **out)
  logits = jnp.reshape(
    logits, (batch, streams, window, size), out_sharding=spec("batch", None, None, axis)
  )
  logits = jnp.reshape(
    logits.swapaxes(1, 2), (batch * window, streams, size), out_sharding=spec("batch", None, axis)
  )
  places = jnp.minimum(done[:, None] + jnp.arange(window)[None], codes - 1)
  weights = jax.vmap(lambda table, rows: table[rows])(control.guidance, places)
  weights = jnp.reshape(weights, (batch * window, streams), out_sharding=spec("batch", None))
  by_stream = logits.swapaxes(0, 1)
  guided = shard(combine_streams(by_stream, weights), "batch", None)
  apart = divergence(shard(by_stream[0], "batch", None), shard(by_stream[-1], "batch", None))
  every = jnp.ones_like(guided[:, 0], bool)
  rows = select(every, dict.fromkeys(control.uses, ~every), control.values)
  values, ids = filter_candidates(guided / rows.temperature[:, None], *rows.top_p, sampler.of_codes)
  place = jax.vmap(lambda ids, p: jnp.zeros(size, p.dtype).at[ids].set(p))

  def by_window(x: Float[Array, "rows K"]) -> Float[Array, "B W K"]:
    return jnp.reshape(x, (batch, window, size), out_sharding=spec("batch", None, None))

  probabilities = place(ids, jax.nn.softmax(values, axis=-1))
  apart = jnp.reshape(apart, (batch, window), out_sharding=spec("batch", None))
  return by_window(probabilities), by_window(jax.nn.log_softmax(guided, axis=-1)), apart


def _first(
  loop: LoopState, keys: Key[Array, " B"], codes: int, window: int, size: int, dtype: str
) -> Window:
  """Returns the window at the start of an image, with uniformly random drafts."""

  def zeros(*shape: int, dtype: DTypeLike = jnp.int32) -> Array:
    split = spec("batch", *[None] * len(shape))
    return jnp.zeros((len(loop.ids), *shape), dtype, out_sharding=split)

  def random_codes(key: Key[Array, ""]) -> Int32[Array, " D"]:
    return jax.random.randint(jax.random.fold_in(key, 2**32 - 1), (window - 1,), 0, size)

  return Window(
    loop=loop,
    done=zeros(),
    drafts=jax.vmap(random_codes)(keys),
    odds=zeros(window - 1, size, dtype=wide(dtype)) + 1 / size,
    codes=zeros(codes + window),
    log_probs=zeros(codes + window, dtype=jnp.float32),
    divergence=zeros(dtype=jnp.float32),
    steps=jnp.int32(0),
  )


def _accept(
  w: Window,
  cache: tuple[Layers, ...],
  p: Float[Array, "B W K"],
  log_p: Float[Array, "B W K"],
  apart: Float32[Array, "B W"],
  keys: Key[Array, " B"],
  codes: int,
  text_size: int,
) -> Window:
  """Moves the window past the accepted drafts and samples new drafts from `p`.

  `p`, `log_p` and `apart` are the results of `_distributions`.
  """
  streams, (window, size) = len(w.loop.seen), p.shape[1:]
  pick = jax.vmap(lambda table, token: table[token])
  cut = jax.vmap(lambda x, start: jax.lax.dynamic_slice_in_dim(x, start, window - 1))
  put = jax.vmap(lambda into, x, i: jax.lax.dynamic_update_slice_in_dim(into, x, i, 0))

  now = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, w.steps), 3))(keys)
  now = [shard(now[:, i], "batch") for i in range(3)]  # `Grammar.start` explains this `shard`.
  holds, tokens = verify(now[0], w.drafts, w.odds, p)
  taken = jnp.minimum(holds + 1, codes - w.done)
  again = jax.vmap(lambda key, p: jax.random.categorical(key, jnp.log(p)))(now[1], p)
  random = jax.vmap(lambda key: jax.random.randint(key, (window,), 0, size))(now[2])
  drafts = jnp.concatenate([again.astype(jnp.int32), random], axis=1)
  moves = to_rows(taken > 0, streams)
  last = to_rows(pick(tokens, jnp.maximum(taken - 1, 0)) + text_size, streams)
  following = w.loop.next_positions + to_rows(taken, streams)
  at = jnp.where(moves, following - 1, w.loop.positions)
  last = jnp.where(moves, last, w.loop.tokens)
  return Window(
    loop=w.loop._replace(tokens=last, positions=at, next_positions=following, cache=cache),
    done=w.done + taken,
    drafts=cut(drafts, taken),
    odds=cut(jnp.concatenate([p, jnp.full_like(p, 1 / size)], axis=1), taken),
    codes=put(w.codes, tokens, w.done),
    log_probs=put(w.log_probs, jax.vmap(pick)(log_p, tokens).astype(jnp.float32), w.done),
    divergence=w.divergence
    + jnp.where(jnp.arange(window)[None] < taken[:, None], apart, 0).sum(axis=1),
    steps=w.steps + 1,
  )


def _after_image(w: Window, plan: Plan, grammar: Grammar, codes: int) -> LoopState:
  """Returns the decoding state after the image, when all samples have the same number of tokens."""
  loop, vocab = w.loop, grammar.vocab
  in_image = jnp.arange(loop.ids.shape[1])[None] < codes
  seen_of = []
  for s, seen in enumerate(loop.seen):
    entries = jnp.arange(seen.shape[1])[None]
    written = (entries >= loop.next_entries[s]) & (entries < loop.next_entries[s] + codes)
    seen_of.append(seen | written)

  def fit(x: Shaped[Array, "B _"], otherwise: int) -> Shaped[Array, "B G"]:
    return jnp.where(in_image, x[:, : loop.ids.shape[1]], otherwise)

  state = grammar.next_part(plan, loop.state)
  return loop._replace(
    seen=tuple(seen_of),
    next_entries=loop.next_entries + codes,
    count=loop.count + codes,
    any_active=jnp.any(grammar.active(plan, state)),
    state=state,
    ids=fit(w.codes + vocab.text_size, vocab.pad),
    log_probs=fit(w.log_probs, 0),
    divergence=loop.divergence + w.divergence,
  )


def generate_image(
  params: DecodeParams,
  control: Control,
  loop: LoopState,
  *,
  static: Static,
  codes: int,
) -> tuple[LoopState, Int32[Array, ""]]:
  """Generates all codes of an image for samples whose plans start with an image.

  Needs a current mesh. `params` must have an image head, and all samples must use a method that
  takes drafts. `loop` is from `loop.prefill`, with capacity for codes + window tokens; it is
  donated. `codes` is I. Each step reads `static.window` (at least 2) codes. Returns (state after
  the image, number of steps).
  """
  assert params.image_head is not None
  config, text_size = static.model, static.grammar.vocab.text_size
  control = split_control(control)
  keys = jax.vmap(jax.random.key)(control.seeds)

  def step(w: Window) -> Window:
    hidden, cache = _read_drafts(config, params.model, w.loop, w.done, w.drafts + text_size)
    p, log_p, apart = _distributions(params, control, hidden, w.done, codes, static.sampler)
    return _accept(w, cache, p, log_p, apart, keys, codes, text_size)

  first = _first(loop, keys, codes, static.window, params.image_head.shape[1], config.dtype)
  w = jax.lax.while_loop(lambda w: jnp.any(w.done < codes), step, first)
  return _after_image(w, control.plan, static.grammar, codes), w.steps

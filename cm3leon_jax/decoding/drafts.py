"""Reads several guessed image codes in a step, and keeps those that equal the sampled codes.

This is Jacobi decoding with coupled noise (arXiv 2510.24211). The random numbers of a token depend
only on its sample's key, its place and its id. So a token does not depend on how many tokens a step
reads, and samples equal those without drafts, up to rounding. Codes after a wrong guess are the
next guesses. Every step costs as much as one of W codes, also where it samples a token of a text.

  window 4, guesses 5 6 7, last token 3: reads 3 5 6 7 and samples 5 6 8 2
  keeps 5 6 8; the next step reads 8 2 and two more guesses
"""

# B samples, S guidance streams, R = B x S rows, W codes of a window, I tokens of an image.

from collections.abc import Callable, Sequence
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Key, Shaped
import numpy as np

from cm3leon_jax.decoding import loop as loop_lib
from cm3leon_jax.decoding.cache import LayerCache, Read, over_streams, put_rows
from cm3leon_jax.decoding.control import Control
from cm3leon_jax.decoding.grammar import State
from cm3leon_jax.decoding.loop import Drafts, LoopState, Static, extend, sample_ids, to_rows
from cm3leon_jax.decoding.params import DecodeParams
from cm3leon_jax.decoding.request import Request
from cm3leon_jax.mesh import shard, spec
from cm3leon_jax.vocab import VocabLayout


def first_guesses(
  requests: Sequence[Request | None], vocab: VocabLayout, image_tokens: int
) -> Int32[np.ndarray, "B I"]:
  """Returns the first codes in each prompt, which are those of a retrieved or given image, or 0."""
  guesses = np.zeros((len(requests), image_tokens), np.int32)
  for row, request in zip(guesses, requests):
    if request is not None:
      prompt = request.streams[0]
      codes = vocab.image_codes(prompt[vocab.is_image(prompt)])[:image_tokens]
      row[: len(codes)] = codes
  return guesses


def _take(x: Shaped[Array, "B N"], index: Int32[Array, "B W"]) -> Shaped[Array, "B W"]:
  return jax.vmap(lambda row, i: row.at[i].get(mode="clip"))(x, index)


def _by_position(hidden: Float[Array, "R W D"], streams: int) -> Float[Array, "_ 1 D"]:
  """Makes the positions of a window the samples of a larger batch, with S adjacent rows each."""
  _, window, width = hidden.shape
  axes = ("length", "act")
  split = jnp.reshape(
    hidden, (-1, streams, window, width), out_sharding=spec("batch", None, *axes)
  ).swapaxes(1, 2)
  split = shard(split, "batch", None, None, "act")
  return jnp.reshape(split, (-1, 1, width), out_sharding=spec("batch", *axes))


def _read_window(
  params: DecodeParams, loop: LoopState, size: Int32[Array, " B"], guesses: Int32[Array, "B W"],
  static: Static,
) -> tuple[Float[Array, "R W D"], tuple]:  # fmt: skip
  """Reads the last token of each row and the guesses after it. Returns (hidden states, cache).

  Only the first `size` entries of a row are written. Token n of a sample has entry n after the
  prompt, modulo the size of the cache. A later window overwrites the entries of wrong guesses.
  """
  assert loop.drafts is not None
  window, streams = guesses.shape[1], len(static.widths)
  ahead = jnp.arange(window)[None]
  places = loop.drafts.counts[:, None] + ahead
  entries, masks = [], []
  for width, seen in zip(static.widths, loop.seen):
    capacity = seen.shape[1]
    entries.append(jnp.where(ahead < size[:, None], (width + places) % capacity, capacity))
    order = (jnp.arange(capacity) - width) % capacity
    masks.append((seen[:, None] | (order[None, None] <= places[:, :, None]))[:, None])

  def write(cache: LayerCache, s: int, k: Read, v: Read) -> LayerCache:
    return cache.write(entries[s], k, v)

  following = to_rows(guesses[:, :-1] + static.grammar.vocab.text_size, streams)
  tokens = jnp.concatenate([loop.tokens[:, None], following], axis=1)
  after = loop.next_positions[:, None] + ahead[:, :-1]
  positions = jnp.concatenate([loop.positions[:, None], after], axis=1)
  positions = jnp.minimum(positions, static.model.max_positions - 1)  # Of unused guesses.
  layers = [list(layer) for layer in loop.cache]
  attend = over_streams(layers, masks, write)
  hidden = extend(static.model, params.model, tokens, positions, attend)
  return hidden, tuple(map(tuple, layers))


def _sample_window(
  params: DecodeParams, control: Control, loop: LoopState, hidden: Float[Array, "R W D"],
  size: Int32[Array, " B"], static: Static,
) -> tuple[Shaped[Array, "B W"], ...]:  # fmt: skip
  """Samples the token after each position of a window. Returns what `loop.sample_ids` returns."""
  assert loop.drafts is not None
  window, ahead = static.drafts, jnp.arange(static.drafts)[None]

  def flat(x: Int32[Array, "B W"]) -> Int32[Array, " _"]:
    return jnp.reshape(x, -1, out_sharding=spec("batch"))

  def by_sample(x: Shaped[Array, " _"]) -> Shaped[Array, "B W"]:
    return jnp.reshape(x, (-1, window), out_sharding=spec("batch", None))

  repeat = functools.partial(to_rows, streams=window)
  of_all = jax.tree.map(lambda x: repeat(x) if x.ndim else x, control)
  state = State(*map(repeat, loop.state))
  state = static.grammar.skip(of_all.plan, state, flat(jnp.minimum(ahead, size[:, None] - 1)))
  now = jax.vmap(jax.random.key)(of_all.seeds)
  now = jax.vmap(jax.random.fold_in)(now, flat(loop.drafts.counts[:, None] + ahead))
  hidden = _by_position(hidden, len(static.widths))
  return tuple(map(by_sample, sample_ids(params, of_all, state, hidden, now, static)))


def decode_step(
  params: DecodeParams,
  control: Control,
  keys: Key[Array, " B"],
  loop: LoopState,
  static: Static,
  counts: Int32[Array, " B"] | None = None,
) -> LoopState:
  """Does what `loop.decode_step` does, but samples 1 to W tokens of each sample.

  Outside of images, a step samples one token. `counts` is not used: `loop.drafts` has the counts.
  """
  del keys, counts
  grammar, streams, drafts = static.grammar, len(static.widths), loop.drafts
  assert drafts is not None
  window, text = static.drafts, grammar.vocab.text_size
  active, in_image = (f(control.plan, loop.state) for f in (grammar.active, grammar.in_image))
  left = jnp.minimum(grammar.codes_left(control.plan, loop.state), window)
  size, ahead = jnp.where(in_image, left, 1), jnp.arange(window)[None]
  codes = grammar.codes_done(control.plan, loop.state)[:, None] + ahead
  guesses = _take(drafts.codes, codes)
  hidden, cache = _read_window(params, loop, size, guesses, static)
  ids, log_probs, apart = _sample_window(params, control, loop, hidden, size, static)

  equal = (ids == guesses + text)[:, :-1] & (ahead[:, 1:] < size[:, None])
  right = jnp.sum(jnp.cumprod(equal.astype(jnp.int32), axis=1), axis=1)
  taken = jnp.where(active, right + 1, 0)
  used, last = ahead < taken[:, None], _take(ids, right[:, None])[:, 0]
  last = jnp.where(active, last, grammar.vocab.pad)
  state = grammar.skip(control.plan, loop.state, right)
  state = grammar.advance(control.plan, state, last)
  put = jnp.where(used, drafts.counts[:, None] + ahead, loop.ids.shape[1])
  of_image = jnp.where((ahead < size[:, None]) & in_image[:, None], codes, grammar.image_tokens)
  moved = to_rows(taken, streams)
  return loop._replace(
    tokens=to_rows(last, streams),
    positions=jnp.where(moved > 0, loop.next_positions + moved - 1, loop.positions),
    next_positions=loop.next_positions + moved,
    cache=cache,
    count=loop.count + 1,
    any_active=jnp.any(grammar.active(control.plan, state)),
    state=state,
    ids=put_rows(loop.ids, ids, put, 1),
    log_probs=put_rows(loop.log_probs, log_probs.astype(jnp.float32), put, 1),
    divergence=loop.divergence + jnp.sum(jnp.where(used, apart, 0), axis=1),
    drafts=Drafts(
      put_rows(drafts.codes, ids - text, of_image, 1), drafts.counts + taken, drafts.steps + active
    ),
  )


def step_of(static: Static) -> Callable[..., LoopState]:
  """Returns the step of a program: with drafts, or `loop.decode_step`."""
  return decode_step if static.drafts else loop_lib.decode_step

"""Implements the decoding loop: prefill reads shared prompts once, then steps use the cache."""

# B samples, S guidance streams, R = B x S rows, U unique prompts, U0 shared prefixes, G tokens to
# generate, T cache entries, L new tokens of one pass, D width, N heads, H head size, V vocabulary,
# I tokens of an image.

from collections.abc import Callable
import functools
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, Key, Shaped
import numpy as np

from cm3leon_jax.config.model import ModelConfig
from cm3leon_jax.decoding import cache as cache_lib
from cm3leon_jax.decoding.batch import Padded, Prompts
from cm3leon_jax.decoding.cache import LayerCache, Layers, Read, Size, over_streams
from cm3leon_jax.decoding.control import Control
from cm3leon_jax.decoding.grammar import Grammar, Plan, State
from cm3leon_jax.decoding.params import (
  DecodeParams,
  dequantized,
  head_axis,
  head_ids,
  head_logits,
  only_codes,
)
from cm3leon_jax.decoding.sampling.guidance import combine_streams, divergence
from cm3leon_jax.decoding.sampling.rows import Sampler, StreamLogits, sample, select
from cm3leon_jax.mesh import shard, spec
from cm3leon_jax.models import transformer
from cm3leon_jax.models.products import Transposed

# (ids, log_probs, divergence), see `_sample_ids`.
Sampled: TypeAlias = tuple[Int[Array, " B"], Float[Array, " B"], Float32[Array, " B"]]


class Static(NamedTuple):
  """Static arguments of a batch's programs.

  Attributes:
    cache_dtype: one of `cache.DTYPES`.
    widths: for each stream, the number of prompt entries that its cache keeps (the last entries).
    max_new_tokens: largest number of tokens to generate, G.
    capacities: capacities of the caches for generated tokens: the initial one, then the larger ones
      to which the caches grow.
  """

  model: ModelConfig
  grammar: Grammar
  sampler: Sampler
  cache_dtype: str
  widths: tuple[Size, ...]
  max_new_tokens: Size
  capacities: tuple[Size, ...]


class LoopState(NamedTuple):
  """The state of the decoding loop.

  Attributes:
    tokens: last token of each row, which the next step reads.
    next_positions: position of the token after the last one.
    cache: caches by layer and stream, with B rows and T entries. T differs between streams, since
      some streams have short prompts.
    seen: for each stream, the entries that a row may attend to.
    next_entries: for each stream, the cache entry to which the next token is written.
    ids: generated ids, with padding after the end of a sample.
    log_probs: log-probability of each id under the guided distribution, before temperature and
      filters; 0 at padding.
    divergence: sum over the image codes of the `guidance.divergence` of the first and last stream.
  """

  tokens: Int32[Array, " R"]
  positions: Int32[Array, " R"]
  next_positions: Int32[Array, " R"]
  cache: tuple[tuple[LayerCache, ...], ...]
  seen: tuple[Bool[Array, "B T"], ...]
  next_entries: Int32[Array, " S"]
  count: Int32[Array, ""]
  any_active: Bool[Array, ""]
  state: State
  ids: Int32[Array, "B G"]
  log_probs: Float32[Array, "B G"]
  divergence: Float32[Array, " B"]


def extend(
  config: ModelConfig,
  model: dict,
  tokens: Int32[Array, "R L"],
  positions: Int32[Array, "R L"],
  attend: Callable,
) -> Float[Array, "R L D"]:
  """Reads L more tokens in each row and returns their hidden states after the final norm.

  `model` is `DecodeParams.model`. `attend` is a function (layer, q, k, v) -> result, see
  `cache.over_streams`. The function also stores k and v.
  """
  bound = transformer.bind(config, {**model, "blocks": {}})
  x = bound.embed_tokens(tokens, positions)
  for i, block in enumerate(model["blocks"]):
    block = dequantized(block, x.dtype)
    x = transformer.apply_block(config, block, x, positions, functools.partial(attend, i))
  return bound.final_norm(x)


def read_padded(
  config: ModelConfig, model: dict, tokens: Padded, cache: Layers, seen: Bool[Array, "U T"],
  entry: Size,
) -> tuple[Layers, Bool[Array, "U T"]]:  # fmt: skip
  """Reads left-padded tokens [U, L] into cache entries [entry, entry + L).

  Returns (cache, seen), where `seen` marks the entries that contain a token.
  """
  length = tokens.ids.shape[1]
  seen = jnp.concatenate([seen[:, :entry], tokens.valid, seen[:, entry + length :]], axis=1)
  ends = entry + jnp.arange(length)
  # All keys of a padding query are masked, so the query averages them. Its result is not used.
  mask = seen[:, None, None, :] & (jnp.arange(seen.shape[1])[None] <= ends[:, None])[None, None]
  layers = list(cache)

  def attend(i: int, q: Read, k: Read, v: Read) -> Read:
    layers[i] = layers[i].write(entry, k, v)
    return layers[i].attend(q, mask)

  extend(config, model, tokens.ids, tokens.positions, attend)
  return tuple(layers), seen


def read_prompts(
  config: ModelConfig, model: dict, prompts: Prompts, cache_dtype: str = "compute"
) -> tuple[Layers, Bool[Array, "U T"]]:
  """Reads every prefix and every rest once.

  U and U0 must be multiples of the number of devices over which the batch is sharded. Returns the
  cache of each layer, with U rows and T = `prompts.entries`, and a mask of the entries that contain
  a token.
  """
  rests = Padded(*(shard(x, "batch", None) for x in prompts.rests))
  count, length = rests.ids.shape
  if prompts.prefixes is None:
    start, seen = 0, jnp.zeros_like(rests.valid)
    cache = cache_lib.empty(config, count, length, cache_dtype)
  else:
    shared = Padded(*(shard(x, "batch", None) for x in prompts.prefixes))
    start, seen = shared.ids.shape[1], jnp.zeros_like(shared.valid)
    cache = cache_lib.empty(config, shared.ids.shape[0], start, cache_dtype)
    cache, seen = read_padded(config, model, shared, cache, seen, 0)
    cache = cache_lib.rows(cache, prompts.prefix_of, start, start + length)
    seen = jnp.pad(cache_lib.local_rows(seen, prompts.prefix_of), ((0, 0), (0, length)))
  return read_padded(config, model, rests, cache, seen, start)


def prefill(model: dict, prompts: Prompts, plan: Plan, static: Static) -> LoopState:
  """Reads the prompts of R rows and returns the state before the first step. Needs a current mesh.

  `model` is `DecodeParams.model`, and `plan` is as in `Control`.
  """
  cache, seen = read_prompts(static.model, model, prompts, static.cache_dtype)
  unique = prompts.row.reshape(-1, len(static.widths))
  caches, seen_of, capacity = [], [], static.capacities[0]
  for s, width in enumerate(static.widths):
    caches.append(cache_lib.rows(cache, unique[:, s], width, width + capacity))
    seen_of.append(
      jnp.pad(cache_lib.local_rows(seen, unique[:, s])[:, -width:], ((0, 0), (0, capacity)))
    )
  plan = shard(plan, "batch", None, None)
  shape, split = (plan.shape[0], static.max_new_tokens), spec("batch", None)
  return LoopState(
    tokens=shard(prompts.last, "batch"),
    positions=shard(prompts.last_positions, "batch"),
    next_positions=shard(prompts.next_positions, "batch"),
    cache=tuple(zip(*caches)),
    seen=tuple(seen_of),
    next_entries=jnp.array(static.widths, jnp.int32),
    count=jnp.int32(0),
    any_active=jnp.bool_(True),
    state=static.grammar.start(plan),
    ids=jnp.full(shape, static.grammar.vocab.pad, jnp.int32, out_sharding=split),
    log_probs=jnp.full(shape, 0, jnp.float32, out_sharding=split),
    divergence=jnp.full(shape[:1], 0, jnp.float32, out_sharding=spec("batch")),
  )


def _read_last(
  config: ModelConfig, model: dict, loop: LoopState
) -> tuple[Float[Array, "R 1 D"], tuple[Layers, ...], tuple[Bool[Array, "B _"], ...]]:
  """Reads the last token of each row. Returns (hidden states, cache, seen)."""

  def mark(x: Bool[Array, "B T"], entry: Int32[Array, ""]) -> Bool[Array, "B T"]:
    one = jnp.ones((x.shape[0], 1), bool, out_sharding=spec("batch", None))
    return jax.lax.dynamic_update_slice_in_dim(x, one, entry, axis=1)

  def write(cache: LayerCache, s: int, k: Read, v: Read) -> LayerCache:
    return cache.write(loop.next_entries[s], k, v)

  seen = tuple(mark(x, loop.next_entries[s]) for s, x in enumerate(loop.seen))
  layers = [list(layer) for layer in loop.cache]
  attend = over_streams(layers, [x[:, None, None, :] for x in seen], write)
  hidden = extend(config, model, loop.tokens[:, None], loop.positions[:, None], attend)
  return hidden, tuple(map(tuple, layers)), seen


def to_rows(x: Shaped[Array, "B ..."], streams: int) -> Shaped[Array, "R ..."]:
  """Repeats each element for the rows of its sample, which has `streams` rows."""
  split = spec("batch", *[None] * (x.ndim - 1))
  rows = streams * x.shape[0]
  return jnp.repeat(x, streams, axis=0, total_repeat_length=rows, out_sharding=split)


def _stream_logits(
  hidden: Float[Array, "R 1 D"], head: Float[Array, "D V"] | Transposed, streams: int
) -> Float[Array, "S B V"]:
  out = head_logits(hidden, head)
  shape = (hidden.shape[0] // streams, streams, out.shape[2])
  split = spec("batch", None, head_axis(shape[2]))
  return jnp.reshape(out, shape, out_sharding=split).swapaxes(0, 1)


def _sample_ids(
  params: DecodeParams, control: Control, state: State, hidden: Float[Array, "R 1 D"],
  keys: Key[Array, " B"], static: Static,
) -> Sampled:  # fmt: skip
  """Samples the next id of each sample.

  Returns (ids, log_probs, divergence). The divergence of a sample is 0 if its id is not an image
  code.
  """
  grammar, sampler, streams = static.grammar, static.sampler, control.guidance.shape[2]
  in_image, active = grammar.in_image(control.plan, state), grammar.active(control.plan, state)
  place = jnp.minimum(grammar.codes_done(control.plan, state), grammar.image_tokens - 1)
  place = jnp.where(in_image, place, grammar.image_tokens)
  weights = jax.vmap(lambda row, i: row[i])(control.guidance, place)

  def sample_columns(
    head: Float[Array, "D V"] | Transposed, candidates: int, is_image: Bool[Array, " B"],
    legal: Bool[Array, "B V"] | None = None,
  ) -> Sampled:  # fmt: skip
    out = _stream_logits(hidden, head, streams)
    logits = [combine_streams(out, weights), out[0], out[-1]]
    of_codes = [only_codes(x, grammar.vocab) for x in logits[1:]]
    apart = divergence(*of_codes) if streams > 1 else jnp.zeros(keys.shape[0], jnp.float32)
    logits = [shard(x, "batch", None) for x in logits]
    if legal is not None:
      logits = [jnp.where(legal, x, -jnp.inf) for x in logits]
    rows = select(is_image, control.contrastive, control.values)
    apart = jnp.where(is_image, apart, 0)
    return *sample(StreamLogits(*logits), keys, rows, candidates, sampler.contrastive_k), apart

  def among_codes() -> Sampled:
    every = jnp.ones_like(in_image)
    ids, log_probs, apart = sample_columns(params.image_head, sampler.of_codes, every)
    return ids + grammar.vocab.text_size, log_probs, apart

  def among_all() -> Sampled:
    # Make all ids legal for a finished sample. Its id is discarded, but a softmax over no ids would
    # be NaN.
    legal = grammar.legal(control.plan, state, head_ids(grammar.vocab)) | ~active[:, None]
    columns, log_probs, apart = sample_columns(params.head, sampler.of_all, in_image, legal)
    return (columns + grammar.vocab.text_size) % grammar.vocab.size, log_probs, apart

  if params.image_head is None:
    return among_all()
  return jax.lax.cond(jnp.all(in_image | ~active), among_codes, among_all)


def decode_step(
  params: DecodeParams,
  control: Control,
  keys: Key[Array, " B"],
  loop: LoopState,
  static: Static,
  counts: Int32[Array, " B"] | None = None,
) -> LoopState:
  """Reads the last token of every row and samples the next token of every sample.

  `control` is sharded over the batch, and the caches of `loop` must have a free entry. `counts` is
  the number of tokens that each sample has so far; None means `loop.count` for all samples. The
  random numbers of a sample depend only on its key and its count.
  """
  grammar, streams = static.grammar, control.guidance.shape[2]

  def put(into: Shaped[Array, "B G"], x: Shaped[Array, " B"]) -> Shaped[Array, "B G"]:
    x = x[:, None].astype(into.dtype)
    return jax.lax.dynamic_update_slice_in_dim(into, x, loop.count, axis=1)

  hidden, cache, seen = _read_last(static.model, params.model, loop)
  active = grammar.active(control.plan, loop.state)
  if counts is None:
    now = jax.vmap(jax.random.fold_in, (0, None))(keys, loop.count)
  else:
    now = jax.vmap(jax.random.fold_in)(keys, counts)
  ids, log_probs, apart = _sample_ids(params, control, loop.state, hidden, now, static)
  ids, log_probs = jnp.where(active, ids, grammar.vocab.pad), jnp.where(active, log_probs, 0)
  state = grammar.advance(control.plan, loop.state, ids)
  moves = to_rows(active, streams)
  return LoopState(
    tokens=to_rows(ids, streams),
    # The position of a finished sample must not grow beyond the learned positions.
    positions=jnp.where(moves, loop.next_positions, loop.positions),
    next_positions=loop.next_positions + moves,
    cache=cache,
    seen=seen,
    next_entries=loop.next_entries + 1,
    count=loop.count + 1,
    any_active=jnp.any(grammar.active(control.plan, state)),
    state=state,
    ids=put(loop.ids, ids),
    log_probs=put(loop.log_probs, log_probs),
    divergence=loop.divergence + jnp.where(active, apart, 0),
  )


def split_control(control: Control) -> Control:
  """Shards the arrays of `control` over the batch. Scalars are not sharded."""

  def split(x: Array | np.ndarray) -> Array | np.ndarray:
    return shard(x, "batch", *[None] * (x.ndim - 1)) if x.ndim else x

  return jax.tree.map(split, control)


def decode_steps(
  params: DecodeParams, control: Control, loop: LoopState, *, static: Static, steps: int
) -> LoopState:
  """Runs at most `steps` steps. Stops early when all samples are finished or the cache is full.

  Needs a current mesh. While only image codes are legal in all samples, only their logits are
  computed. `loop` is donated.
  """
  control = split_control(control)
  keys = jax.vmap(jax.random.key)(control.seeds)
  free = loop.seen[0].shape[1] - loop.next_entries[0]  # All streams have equally many free entries.
  stop = jnp.minimum(loop.count + jnp.minimum(steps, free), loop.ids.shape[1])
  step = functools.partial(decode_step, params, control, keys, static=static)
  return jax.lax.while_loop(lambda loop: (loop.count < stop) & loop.any_active, step, loop)


def grow(loop: LoopState, *, by: int) -> LoopState:
  """Appends `by` empty entries to the caches.

  Attention reads all entries, so a cache should have few empty entries and grow when it is full.
  """
  cache = tuple(tuple(cache_lib.grown(layer, by)) for layer in loop.cache)
  return loop._replace(cache=cache, seen=tuple(jnp.pad(x, ((0, 0), (0, by))) for x in loop.seen))


def results(
  loop: LoopState,
) -> tuple[Int32[Array, "B G"], Float32[Array, "B G"], Float32[Array, " B"]]:
  """Returns (ids, log_probs, divergence), replicated so that each process can read them."""
  return jax.sharding.reshard((loop.ids, loop.log_probs, loop.divergence), jax.P())
